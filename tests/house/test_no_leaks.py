"""Nothing in the repository knows the machine it was written on, or where a machine downloads from."""

import re
from pathlib import Path

import pytest
from house import ROOT, repository_files

# The licence's own address, documentation and papers are what links are for; these are what a download would need.
DOWNLOADS = re.compile(
    r"https?://\S+\.(whl|tar\.gz|tgz|zip|deb|tar|safetensors|pth|ckpt)\b|(curl|wget)\s+\S*https?:|git\+(https|ssh):"
)
REGISTRIES = re.compile(r"--(extra-)?index-url\b|--find-links\b|--trusted-host\b")
# Hosts are allowed, not forbidden: a list of what must not stand here would have to stand here.
HOSTS = re.compile(r"https?://(?!127\.0\.0\.1|localhost|www\.apache\.org|([\w-]+\.)?example\.org)[\w-]+\.[\w.-]+")
# A home or a workplace; system folders such as /etc/hosts and /dev/shm are the same everywhere.
MACHINES = re.compile(r"(?<![\w.$}])/(home|root|Users|work|workspace|mnt|scratch|opt)/[\w.-]+")
SECRETS = re.compile(
    r"AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY-----|\bghp_[A-Za-z0-9]{36}\b|://[^/\s:@{}]+:[^/\s:@{}]+@"
)

SUSPECTS = {
    "a download": DOWNLOADS,
    "a registry": REGISTRIES,
    "a host": HOSTS,
    "a path of one machine": MACHINES,
    "a secret": SECRETS,
}
BINARY = {".png", ".jpg", ".safetensors", ".tar", ".npz", ".index", ".rows"}
ANSWERS = "rows"  # the file of a teacher's answers on disk
LARGEST = 1_000_000


def is_text(file: Path) -> bool:
    return file.suffix not in BINARY and file.name != ANSWERS


def suspicions(text: str) -> list[str]:
    return [f"{what}: {match[0]}" for what, pattern in SUSPECTS.items() for match in pattern.finditer(text)]


def test_nothing_leaks() -> None:
    here = Path(__file__).resolve()
    texts = [file for file in repository_files() if is_text(file) and file.resolve() != here]
    assert len(texts) > 50
    found = {str(file.relative_to(ROOT)): suspicions(file.read_text()) for file in texts}
    assert not {name: said for name, said in found.items() if said}


def test_this_checkout_is_named_nowhere() -> None:
    place = str(ROOT.parent) + "/"
    if len(ROOT.parts) < 3:
        pytest.skip("the checkout lies at the root of the filesystem, whose name says nothing")
    texts = [file for file in repository_files() if is_text(file)]
    assert not [file for file in texts if place in file.read_text()]


def test_nothing_is_large() -> None:
    """Data, checkpoints and weights are made or mounted, never kept in git."""
    assert not {
        str(file.relative_to(ROOT)): size for file in repository_files() if (size := file.stat().st_size) > LARGEST
    }


def test_constraints_are_versions_only() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pinned = re.compile(r"[a-z0-9][a-z0-9._-]*==[0-9][\w.]*( ; .+)?")
    assert lines
    assert not [line for line in lines if not pinned.fullmatch(line)]


@pytest.mark.parametrize(
    "text",
    [
        "data: /home/someone/shards",
        "cd /root/project",
        "pip install --extra-index-url https://example.org torch",
        "wget https://example.org/x",
        "see https://host.invalid/simple",
        "https://example.org/weights.safetensors",
        "s3://user:password@host/bucket",
    ],
)
def test_a_leak_would_be_seen(text: str) -> None:
    assert suspicions(text)
