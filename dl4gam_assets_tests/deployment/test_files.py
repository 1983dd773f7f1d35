"""The files in deploy/: whole, in agreement with each other and with the package."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from dl4gam_assets import __version__

DEPLOY = Path(__file__).parents[2] / "deploy"
PACKAGE = DEPLOY.parent / "dl4gam_assets"


def load(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def example() -> dict[str, str]:
    lines = (DEPLOY / ".env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def test_every_variable_that_compose_wants_is_in_the_example_and_known() -> None:
    wanted = set(re.findall(r"\$\{(\w+)\}", (DEPLOY / "compose.yaml").read_text()))
    assert wanted <= set(example())
    code = "".join(p.read_text() for p in PACKAGE.rglob("*.py"))
    ours = {n for n in example() if n.startswith("DL4GAM_")} | {
        n for service in load("compose.yaml")["services"].values() for n in service.get("environment", {})
        if n.startswith("DL4GAM_")
    } | {
        e["name"] for e in load("helm/dagster-values.yaml")["dagster-user-deployments"]["deployments"][0]["env"]
    }  # fmt: skip
    for name in ours - {"DL4GAM_DATA", "DL4GAM_STORE"}:  # used by compose.yaml itself
        assert name in code, f"{name} is set by a deployment, but nothing reads it"
    assert not any(v for k, v in example().items() if "KEY" in k or "WEBHOOK" in k)  # no secret is shipped


def test_services_find_each_other_and_the_outside_sees_only_loopback() -> None:
    services = load("compose.yaml")["services"]
    workspace = load("workspace.yaml")["load_from"][0]["grpc_server"]
    assert workspace["host"] in services and f"--port {workspace['port']}" in services[workspace["host"]]["command"]
    for name, service in services.items():
        for other in service.get("depends_on", {}):
            assert other in services, f"{name} waits for {other}"
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} is open to the network: {port}"
    environment = services["code"]["environment"]
    assert environment["DL4GAM_DASK_SCHEDULER"].split("//")[1].split(":")[0] in services
    assert "+psycopg2://" in environment["DAGSTER_POSTGRES_URL"]
    images = {s["image"] for n, s in services.items() if n != "postgres"}
    assert len(images) == 1  # workers of another version would be refused


def test_the_image_has_what_the_files_name() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    for source in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        for name in source.split():
            assert (DEPLOY.parent / name).exists(), f"{name} is copied into the image, but is not there"
    assert "USER dl4gam" in text and ".[team" in text


def test_charts_run_the_same_image_of_this_version() -> None:
    dagster, dask = load("helm/dagster-values.yaml"), load("helm/dask-values.yaml")
    (deployment,) = dagster["dagster-user-deployments"]["deployments"]
    images = [deployment["image"], dask["scheduler"]["image"], dask["worker"]["image"]]
    assert {(i["repository"], i["tag"]) for i in images} == {("registry.example.org/dl4gam-assets", __version__)}
    store = {e["name"]: e.get("value") for e in deployment["env"]}["DL4GAM_HOME"]
    assert store == {e["name"]: e.get("value") for e in dask["worker"]["env"]}["DL4GAM_HOME"] and "://" in store


@pytest.mark.parametrize("files", [["compose.yaml"], ["compose.yaml", "compose.gpu.yaml"]])
def test_compose_accepts_the_files(files: list[str], tmp_path: Path) -> None:
    command = next(
        (c for c in (["docker-compose"], ["docker", "compose"]) if shutil.which(c[0]) and _answers([*c, "version"])),
        None,
    )
    if command is None:
        pytest.skip("docker compose is absent")
    folder = shutil.copytree(DEPLOY, tmp_path / "deploy")
    (folder / ".env").write_text((DEPLOY / ".env.example").read_text())
    words = [w for f in files for w in ("-f", f)]
    done = subprocess.run([*command, *words, "config"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = yaml.safe_load(done.stdout)
    assert set(made["services"]) == {"postgres", "code", "webserver", "daemon", "dask-scheduler", "dask-worker"}
    assert made["services"]["code"]["environment"]["DL4GAM_REGION"] == "demo"


def _answers(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
