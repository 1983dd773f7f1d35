"""The files in deploy/: whole, in agreement with each other and with the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dl4gam_assets import __version__
from dl4gam_assets.assets.common import gpu_tags
from dl4gam_assets.storage import Storage

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


def test_what_the_image_starts_by_name_is_in_it(tmp_path: Path) -> None:
    """Dask's chart starts its scheduler as `dask-scheduler`, and its workers by the one word of the values."""
    by_chart = ["dask-scheduler", load("helm/dask-values.yaml")["worker"]["image"]["dask_worker"]]
    assert "COPY deploy/bin/ /usr/local/bin/" in (DEPLOY / "Dockerfile").read_text()
    for name in by_chart:
        script = DEPLOY / "bin" / name
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            [script, "--help"], env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True
        )
        # What the chart's templates give to them.
        wanted = ("--port", "--dashboard-address") if name == "dask-scheduler" else ("--nthreads", "--memory-limit")
        assert all(option in done.stdout for option in wanted), name


def test_the_image_has_the_libraries_that_gdal_asks_the_system_for() -> None:
    """rasterio's wheel brings its GDAL; what that needs and no slim image has must be installed."""
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf is absent")
    import rasterio

    libraries = list((Path(rasterio.__file__).parents[1] / "rasterio.libs").glob("*.so*"))
    if not libraries:
        pytest.skip("rasterio is not from a wheel here")
    own = {re.sub(r"-[0-9a-f]{8}", "", file.name).split(".so")[0] for file in libraries}
    needed: set[str] = set()
    for file in libraries:
        told = subprocess.run([readelf, "-d", str(file)], capture_output=True, text=True, check=True).stdout
        needed |= {re.sub(r"-[0-9a-f]{8}", "", n).split(".so")[0] for n in re.findall(r"NEEDED.*\[(.+?)\]", told)}
    # glibc, the compiler's libraries and zlib, which Python itself links, are in every image with Python.
    there = {
        "libc",
        "libm",
        "libdl",
        "libpthread",
        "librt",
        "libutil",
        "libz",
        "libgcc_s",
        "libstdc++",
        "ld-linux-x86-64",
    }
    installed = {name.rstrip("0123456789") for name in re.findall(r"\b(lib\w+)\b", (DEPLOY / "Dockerfile").read_text())}
    assert {n for n in needed - own - there if n.rstrip("0123456789") not in installed} == set()


def test_workers_of_the_chart_reach_the_store_of_the_code() -> None:
    names = {entry["name"] for entry in load("helm/dask-values.yaml")["worker"]["env"]}
    assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"} <= names


def test_a_blank_region_is_no_region(monkeypatch: pytest.MonkeyPatch) -> None:
    botocore = pytest.importorskip("botocore.session", reason="botocore is absent: pip install -e '.[team]'")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "")
    with pytest.raises(ValueError, match="Invalid endpoint"):  # what a blank line in a file of variables did
        botocore.get_session().create_client("s3", aws_access_key_id="a", aws_secret_access_key="b")
    Storage("/tmp/here")
    assert "AWS_DEFAULT_REGION" in os.environ, "of no concern for a folder"
    Storage("memory://bucket/here")
    assert "AWS_DEFAULT_REGION" not in os.environ
    botocore.get_session().create_client("s3", aws_access_key_id="a", aws_secret_access_key="b")


def test_runs_and_webserver_share_what_runs_print() -> None:
    home = load("compose.yaml")["services"]["code"]["environment"]["DAGSTER_HOME"]
    for name in ("code", "webserver", "daemon"):
        assert f"logs:{home}/storage" in load("compose.yaml")["services"][name]["volumes"]
    assert f"{home}/storage" in (DEPLOY / "Dockerfile").read_text(), "a volume takes its owner from the image"


def test_pods_with_gpus_go_to_gpu_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DL4GAM_K8S_GPUS", raising=False)
    assert gpu_tags() == {}
    monkeypatch.setenv("DL4GAM_K8S_GPUS", "2")
    monkeypatch.setenv("DL4GAM_K8S_GPU_NODES", "gpu=h100, zone = a")
    job = pytest.importorskip("dagster_k8s.job", reason="dagster-k8s is absent: pip install -e '.[team]'")
    asked = job.UserDefinedDagsterK8sConfig.from_dict(gpu_tags()["dagster-k8s/config"])
    assert asked.container_config["resources"]["limits"] == {"nvidia.com/gpu": "2"}
    assert asked.pod_spec_config["node_selector"] == {"gpu": "h100", "zone": "a"}
    made = job.construct_dagster_k8s_job(
        job.DagsterK8sJobConfig(job_image="image", dagster_home="/opt"), ["dagster"], "step",
        user_defined_k8s_config=asked,
    )  # fmt: skip
    pod = made.to_dict()["spec"]["template"]["spec"]
    assert pod["node_selector"] == {"gpu": "h100", "zone": "a"} and pod["tolerations"][0]["key"] == "nvidia.com/gpu"
    monkeypatch.setenv("DL4GAM_K8S_GPU_NODES", "h100")
    with pytest.raises(ValueError, match="DL4GAM_K8S_GPU_NODES"):
        gpu_tags()


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
