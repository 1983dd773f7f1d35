"""Resources: where a region's settings, store, processes and device come from.

Belongs here: Dagster resources that return plain objects, which know nothing of Dagster.
Does not belong here: any work.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field
from upath import UPath

from dl4gam_assets.compute import Mapper
from dl4gam_assets.settings import Region, load_region
from dl4gam_assets.stages.base import Workspace
from dl4gam_assets.storage import Storage

#: Tag of runs that make their partitions even where nothing changed: ``true``.
FORCE_TAG = "dl4gam/force"
#: Folder of all results where DL4GAM_HOME is not set.
DEFAULT_HOME = "dl4gam_home"


def home() -> str:
    """Root of all stores: $DL4GAM_HOME (a folder or an object-store URL), or ``dl4gam_home`` below this folder."""
    return os.environ.get("DL4GAM_HOME") or str(Path(DEFAULT_HOME).absolute())


def region_name() -> str:
    """The region of this process: $DL4GAM_REGION (a packaged name or a YAML path), or the demo."""
    return os.environ.get("DL4GAM_REGION") or "demo"


def store_of(region: Region, root: str | None = None) -> Storage:
    return Storage(UPath(root or home()) / region.name)


class RegionResource(dg.ConfigurableResource):
    """Settings and store of a region."""

    region: str = Field(description="Packaged region name, or path of a YAML file.")
    home: str = Field(description="Root of all stores: a folder or an object-store URL.")

    def settings(self) -> Region:
        return load_region(self.region)

    def storage(self) -> Storage:
        return store_of(self.settings(), self.home)


class ComputeResource(dg.ConfigurableResource):
    """Processes for maps over glaciers."""

    workers: int = Field(0, description="Processes of the embedded dask cluster; 0: the region's setting.")
    scheduler: str = Field("", description="Address of a dask scheduler (tcp://host:8786); empty: embedded cluster.")

    def mapper(self, region: Region) -> Mapper:
        return Mapper(self.workers or region.compute.workers, self.scheduler or None)


class DeviceResource(dg.ConfigurableResource):
    """Device for training and inference."""

    device: str = Field("", description="cpu, cuda, mps or auto; empty: the region's setting.")

    def name(self, region: Region) -> str:
        return self.device or region.compute.device


class WorkspaceResource(dg.ConfigurableResource):
    """What every asset takes: the region, its store, processes and device."""

    region: RegionResource
    compute: ComputeResource
    device: DeviceResource

    def open(self, context: dg.AssetExecutionContext) -> Workspace:
        """The plain workspace of one run."""
        forced = context.run.tags.get(FORCE_TAG) == "true"
        return dataclasses.replace(self.plain(), logger=context.log, run_id=context.run.run_id, force=forced)

    def plain(self) -> Workspace:
        """The workspace outside of a run: for sensors."""
        settings = self.region.settings()
        return Workspace(
            region=settings,
            storage=self.region.storage(),
            mapper=self.compute.mapper(settings),
            device=self.device.name(settings),
        )


class WebhookResource(dg.ConfigurableResource):
    """Where failures are told: the webhook of a chat. The address is a secret and comes from the environment."""

    url: str = Field("", description="Address to post {'text': ...} to; empty: failures are only logged.")
    host: str = Field("", description="The only host that gets messages; the address must lie there.")
    ui: str = Field("", description="Address of Dagster's UI, for links in messages.")

    def send(self, text: str) -> None:
        """Send a message, if a webhook is configured. Raises NotifyError if it could not be delivered."""
        if self.url:
            from dl4gam_assets.notify import send

            send(self.url, self.host, text)

    def link(self, run_id: str) -> str | None:
        return f"{self.ui.rstrip('/')}/runs/{run_id}" if self.ui else None


def default_webhook() -> WebhookResource:
    """The webhook of DL4GAM_WEBHOOK_URL at DL4GAM_WEBHOOK_HOST, with links to DL4GAM_UI_URL; read when it is used."""
    return WebhookResource(
        url=_secret("DL4GAM_WEBHOOK_URL"), host=_secret("DL4GAM_WEBHOOK_HOST"), ui=_secret("DL4GAM_UI_URL")
    )


def _secret(name: str) -> Any:
    """An environment variable that Dagster shows by name, never by value; empty where it is not set."""
    return dg.EnvVar(name) if os.environ.get(name) else ""


def default_workspace() -> WorkspaceResource:
    """The workspace that the environment asks for: DL4GAM_REGION, DL4GAM_HOME, DL4GAM_DASK_SCHEDULER, DL4GAM_DEVICE."""
    return WorkspaceResource(
        region=RegionResource(region=region_name(), home=home()),
        compute=ComputeResource(workers=0, scheduler=os.environ.get("DL4GAM_DASK_SCHEDULER", "")),
        device=DeviceResource(device=os.environ.get("DL4GAM_DEVICE", "")),
    )
