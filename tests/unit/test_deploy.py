"""The files in deploy/: their syntax, and that the commands in them are what this version takes."""

from pathlib import Path

import pytest
import tyro
import yaml

from cutlayer.cli.certs import CertsArguments
from cutlayer.cli.joining import JoinArguments
from cutlayer.cli.serving import HealthArguments, parse_serve

DEPLOY = Path(__file__).parents[2] / "deploy"


def check(command: list[str]) -> None:
    name, *arguments = command
    if name == "serve":
        assert parse_serve(arguments).client == ("alice", "bob")
    elif name == "join":
        assert tyro.cli(JoinArguments, args=arguments).accept_cut == ("layer3",)
    else:
        tyro.cli({"certs": CertsArguments, "health": HealthArguments}[name], args=arguments)


def test_compose() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert set(services) == {"certs", "server", "alice", "bob"}
    for service in services.values():
        check(service["command"])
        assert (
            (DEPLOY / "compose.yaml")
            .parent.joinpath(service["build"]["context"], service["build"]["dockerfile"])
            .exists()
        )
    check(services["server"]["healthcheck"]["test"][2:])


def test_kubernetes() -> None:
    parts = {part["kind"]: part for part in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}
    assert set(parts) == {"PersistentVolumeClaim", "ConfigMap", "Deployment", "Service"}
    pod = parts["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    for command in (
        container["args"],
        *(container[f"{p}Probe"]["exec"]["command"][1:] for p in ("liveness", "readiness")),
    ):
        check(command)
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["spec"]["volumes"]
    }
    assert parts["Service"]["spec"]["selector"] == pod["metadata"]["labels"]


@pytest.mark.parametrize("word", ["FROM", "ENTRYPOINT", "USER", "STOPSIGNAL"])
def test_containerfile(word: str) -> None:
    lines = (DEPLOY / "Containerfile").read_text().replace("\\\n", " ").splitlines()
    known = {"ARG", "FROM", "RUN", "COPY", "USER", "WORKDIR", "ENV", "EXPOSE", "STOPSIGNAL", "ENTRYPOINT", "CMD"}
    words = [line.split()[0] for line in lines if line and not line.startswith("#")]
    assert set(words) <= known
    assert word in words
