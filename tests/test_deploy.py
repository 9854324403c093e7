"""Dockerfile and examples for Kubernetes: no container engine runs here, so what they say is held against the server."""

import argparse
import re
import shlex
from pathlib import Path

import pytest
import yaml

from jaxserve.cli import serve
from jaxserve.cli.flags import given, parse
from jaxserve.cli.options import engine_options
from jaxserve.server.app import create_app
from jaxserve.server.config import ServerConfig
from jaxserve.server.run import LAST_WORDS_S

ROOT = Path(__file__).parent.parent
CHIPS = {"nvidia.com/gpu", "google.com/tpu"}
INSTRUCTIONS = {
    *("FROM", "ARG", "RUN", "COPY", "ENV", "WORKDIR", "USER", "VOLUME"),
    *("EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD"),
}


def options(arguments: list[str]) -> tuple[ServerConfig, dict]:
    """What `jaxserve serve` makes of a command line. An unknown flag exits."""
    command, *rest = arguments
    assert command == "serve"
    parser = argparse.ArgumentParser(allow_abbrev=False)
    serve.add_arguments(parser)
    args = parse(parser, rest)
    return ServerConfig(**given(args, ServerConfig)), engine_options(args)


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def documents(name: str) -> dict[str, dict]:
    """By kind."""
    return {each["kind"]: each for each in yaml.safe_load_all((ROOT / "docs/deploy/kubernetes" / name).read_text())}


@pytest.fixture(params=["gpu.yaml", "tpu.yaml"])
def kinds(request):
    return documents(request.param)


@pytest.fixture
def pod(kinds):
    return kinds["Deployment"]["spec"]["template"]["spec"]


def test_the_dockerfile_copies_what_there_is_and_runs_what_exists():
    found = instructions()
    assert {word for word, _ in found} <= INSTRUCTIONS
    assert found[0][0] == "FROM" and re.fullmatch(r"[\w./-]+:[\w.-]+", found[0][1]), "a tag, and not the latest"
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for rest in (rest for word, rest in found if word == "COPY"):
        for source in rest.split()[:-1]:
            assert (ROOT / source).exists() and source in kept, source
    last = dict(found)
    assert last["USER"] not in ("root", "0") and last["STOPSIGNAL"] == "SIGTERM"
    command = yaml.safe_load(last["ENTRYPOINT"]) + yaml.safe_load(last["CMD"])
    assert command[0] == "jaxserve"
    config, _ = options(command[1:])
    assert config.host == "0.0.0.0" and str(config.port) == last["EXPOSE"]
    assert f":{config.port}/health" in last["HEALTHCHECK"]


def test_extras_of_the_dockerfile_are_extras_of_the_package():
    known = (ROOT / "pyproject.toml").read_text()
    for extra in ("server", *re.findall(r"EXTRA=(\w+)", (ROOT / "Dockerfile").read_text())):
        assert f"\n{extra} = [" in known
    (run,) = [rest for word, rest in instructions() if word == "RUN" and "pip install" in rest]
    assert '".[server${EXTRA:+,$EXTRA}]"' in run
    for word, rest in instructions():
        if word == "RUN":
            shlex.split(rest)  # quotes are closed


def test_pods_use_flags_that_exist(pod):
    (container,) = pod["containers"]
    config, engine = options(container["args"])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert config.host == "0.0.0.0" and ports == {"http": config.port}
    (chips,) = [int(count) for name, count in container["resources"]["limits"].items() if name in CHIPS]
    assert engine.get("tensor_parallel_size", 1) == chips
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts.values())
    assert config.has_keys and mounts[str(Path(config.api_key_file).parent)] == "keys"
    assert mounts["/cache"] and ("VOLUME", "/cache") in instructions()


def test_probes_ask_routes_that_need_no_key(pod, tmp_path):
    (tmp_path / "keys").write_text("ada: sk-ada")
    app = create_app(ServerConfig(api_key_file=str(tmp_path / "keys")), ("tiny",))
    (container,) = pod["containers"]
    probes = {name: container[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert {probe["path"] for probe in probes.values()} <= set(app.openapi()["paths"])
    assert probes["livenessProbe"]["path"] == "/health", "a pod that loads or drains must not be killed for it"
    assert probes["readinessProbe"]["path"] == "/ready"
    assert all(probe["port"] == "http" for probe in probes.values())


def test_a_pod_may_end_what_it_has_begun(pod):
    (container,) = pod["containers"]
    config, _ = options(container["args"])
    _, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert pod["terminationGracePeriodSeconds"] >= int(seconds) + config.drain_timeout + LAST_WORDS_S + 10
    compose = yaml.safe_load((ROOT / "docs/deploy/compose.yaml").read_text())["services"]["jaxserve"]
    config, _ = options(compose["command"])
    assert int(compose["stop_grace_period"].removesuffix("s")) >= config.drain_timeout + LAST_WORDS_S + 5


def test_a_pod_has_no_more_rights_than_it_needs(pod):
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
    assert str(pod["securityContext"]["runAsUser"]) == dict(instructions())["USER"]
    rights = container["securityContext"]
    assert rights["readOnlyRootFilesystem"] and not rights["allowPrivilegeEscalation"]
    assert rights["capabilities"] == {"drop": ["ALL"]}


def test_all_parts_mean_the_same_pods(kinds):
    labels = kinds["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert kinds["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert kinds["Service"]["spec"]["selector"] == labels
    assert kinds["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    (port,) = kinds["Service"]["spec"]["ports"]
    assert port["targetPort"] == "http"


def test_the_tpu_pod_takes_all_chips_of_its_topology():
    pod = documents("tpu.yaml")["Deployment"]["spec"]["template"]["spec"]
    selector = pod["nodeSelector"]
    rows, columns = map(int, selector["cloud.google.com/gke-tpu-topology"].split("x"))
    assert pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == str(rows * columns)
    assert selector["cloud.google.com/gke-tpu-accelerator"].startswith("tpu-")
