"""The environment's files say the same: pins, locks, conda YAML, range of Python versions."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
ENVS = ROOT / "envs"
LOCKS = ["cpu.txt", "cuda.txt"]
CUDA_ONLY = re.compile(r"(nvidia|cuda|triton)")
PIN = re.compile(
    r"(?P<name>[A-Za-z0-9._-]+)(\[(?P<extras>[a-z0-9,_-]+)\])?==(?P<version>[A-Za-z0-9.!+]+)"
    r"(\s*;\s*(?P<marker>.+))?"
)


def parse_pin(text):
    """Return (canonical name, extras, version) of one pinned requirement."""
    match = PIN.fullmatch(text)
    assert match, f"not pinned with ==: {text!r}"
    name = re.sub(r"[-_.]+", "-", match["name"]).lower()
    return name, match["extras"] or "", match["version"]


def requirement_lines(file):
    lines = (re.sub(r"(^|\s+)#.*", "", line).strip() for line in file.read_text().splitlines())
    return [line for line in lines if line]


def direct_pins():
    return [parse_pin(line) for line in requirement_lines(ENVS / "requirements.in")]


def lock_entries(lock):
    """Locked (name, version) pairs; a name may have several versions, one for each marker."""
    pins = [parse_pin(line) for line in requirement_lines(ENVS / lock)]
    return {(name, version) for name, _, version in pins}


def conda_dependencies():
    return yaml.safe_load((ENVS / "environment.yaml").read_text())["dependencies"]


def test_each_direct_dependency_has_one_pin_and_a_reason():
    names = [name for name, _, _ in direct_pins()]
    assert len(names) == len(set(names)) > 0
    for line in (ENVS / "requirements.in").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            assert re.search(r"\s# \S", line), f"no reason given: {line!r}"


def test_conda_yaml_has_the_direct_pins():
    (pip_section,) = [entry["pip"] for entry in conda_dependencies() if isinstance(entry, dict)]
    assert sorted(parse_pin(line) for line in pip_section) == sorted(direct_pins())


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_holds_every_direct_pin(lock):
    locked = lock_entries(lock)
    for name, _, version in direct_pins():
        assert {v for n, v in locked if n == name} == {version}, f"{name}: run `make lock`"


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_holds_the_packages_of_the_ifeval_extra(lock):
    assert {"langdetect", "immutabledict", "nltk"} <= {name for name, _ in lock_entries(lock)}


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_names_no_index_address_or_hash(lock):
    text = (ENVS / lock).read_text()
    assert "://" not in text
    assert "--" not in "".join(requirement_lines(ENVS / lock))


def test_locks_differ_in_the_cuda_packages_only():
    cpu, cuda = lock_entries("cpu.txt"), lock_entries("cuda.txt")
    cuda_only = {(name, version) for name, version in cuda if CUDA_ONLY.match(name)}
    names = {name for name, _ in cuda_only}
    assert "triton" in names
    assert any(name.startswith("nvidia-") for name in names)
    assert cuda - cuda_only == cpu


def test_range_of_python_versions_agrees():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    requires = pyproject["project"]["requires-python"]
    low, high = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", requires).groups()
    assert f"python {requires}" in conda_dependencies()
    assert pyproject["tool"]["ruff"]["target-version"] == f"py3{low}"
    makefile = (ROOT / "Makefile").read_text()
    assert f"(3, {low}) <= sys.version_info[:2] <= (3, {int(high) - 1})" in makefile
    assert f"--python-version 3.{low}" in makefile
