"""What the guest does while it is copied.

Its machine is the one of the tests (tests/guest/make): a Debian kernel, 240 MB
of programs and data on disk, and a workload that checks itself and prints a
heartbeat every 100 ms. `idle` and `noise:<MB/s>` are that workload's own; for
`database` (a real SQLite) and `files` it idles beside the scripts in loads/,
which a second initrd, laid over the first, carries.
"""

import gzip
import os
import re
import shutil
import subprocess
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
LOADS = ("idle", "database", "files", "noise:8")
# Heartbeats before anything is copied: what a load fills first is filled then.
WARM_BEATS = 60


def known(load: str) -> bool:
    """Is this the name of a load? Noise may be of any rate."""
    return load in LOADS or re.fullmatch(r"noise:[0-9]{1,3}", load) is not None


def kernel_words(load: str) -> str:
    """What the kernel's command line says of it."""
    own = load if load.startswith("noise:") else "idle"
    return f"rdinit=/bench/init farhaven.load={own} bench.load={load.split(':')[0]}"


def libraries(program: str) -> list[str]:
    """The shared libraries that a program of this host is loaded with."""
    listed = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout
    return re.findall(r"(/\S+) \(0x", listed)


def make_initrd(image: str, into: str) -> str:
    """The guest's initrd with the loads laid over it; returns its path."""
    sqlite = shutil.which("sqlite3")
    if sqlite is None:
        raise RuntimeError("sqlite3 is missing; run: apt-get install -y sqlite3")
    with tempfile.TemporaryDirectory(prefix="farhaven-bench-initrd-") as tree:
        place = f"{tree}/bench"
        os.makedirs(place)
        for name in os.listdir(f"{HERE}/loads"):
            shutil.copy(f"{HERE}/loads/{name}", place)
        os.chmod(f"{place}/init", 0o755)
        shutil.copy(sqlite, f"{place}/sqlite3")
        for library in libraries(sqlite):
            os.makedirs(tree + os.path.dirname(library), exist_ok=True)
            shutil.copy(os.path.realpath(library), tree + library)
        names = subprocess.run(["find", ".", "-mindepth", "1"], cwd=tree, check=True,
                               capture_output=True).stdout
        names = b"\n".join(sorted(names.splitlines()))
        archive = subprocess.run(["cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0"], cwd=tree,
                                 input=names, check=True, capture_output=True).stdout
    path = f"{into}/initrd"
    with open(f"{image}/initrd", "rb") as first, open(path, "wb") as both:
        both.write(first.read())
        both.write(gzip.compress(archive, 1, mtime=0))
    return path
