import re
from pathlib import Path

import compose_spec
import pytest
import yaml

FILE = Path(__file__).parents[2] / "infra/compose/compose.yaml"
CONTENT = yaml.safe_load(FILE.read_text())


def parse(text):
    options = compose_spec.PyOptions()
    options.apply_merge = True  # `<<: *anchor`
    return options.from_yaml(text)


def test_the_file_is_a_compose_file():
    parsed = parse(FILE.read_text())
    parsed.validate()
    assert sorted(parsed.service_names()) == sorted(CONTENT["services"])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("restart: sometimes", "unknown variant `sometimes`"),
        ("port: [80]", "`port` does not start with"),
        ("ports: 80", "invalid type: integer `80`"),
        ("depends_on: {other: {condition: up}}", "unknown variant `up`"),
    ],
)
def test_the_schema_refuses_what_is_wrong(wrong, said):
    with pytest.raises(ValueError, match=said):
        parse(f"services:\n  one:\n    image: busybox\n    {wrong}\n")


def test_ports_are_on_loopback():
    ports = [port for service in CONTENT["services"].values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_passwords_come_from_the_environment():
    example = (FILE.parent / "example.env").read_text()
    for service in CONTENT["services"].values():
        for name, value in service.get("environment", {}).items():
            if re.search("SECRET|PASSWORD|TOKEN", name):
                [variable] = re.findall(r"^\$\{(\w+):\?", value)
                assert f"{variable}=" in example


def test_files_that_are_mounted_exist():
    for service in CONTENT["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in CONTENT["volumes"] or (FILE.parent / source).is_file()
