"""What Farhaven is held against, each doing the same work over the same link:
QEMU's own migration with the disks mirrored, and copies of the disk alone."""

import os
import subprocess
import time
from typing import Any

from cell import Cell
from guest import Qmp, silence

# The last is not asked for; it is what QEMU has for a guest that changes faster
# than the link carries.
MODES = ("plain", "xbzrle", "multifd-zstd", "multifd-zstd-throttled")
DISKS = ("root", "data")
THERE = "10.99.0.2"
# Farhaven's own default of `protect.max_blackout` is near this.
DOWNTIME_LIMIT_MS = 300

Figures = dict[str, Any]


def prepare(qmp: Qmp, mode: str) -> None:
    """The capabilities and parameters of a mode, alike at both ends."""
    wanted = ["pause-before-switchover", "events"]
    parameters: dict[str, Any] = {"max-bandwidth": 10 << 30, "downtime-limit": DOWNTIME_LIMIT_MS}
    if mode == "xbzrle":
        wanted.append("xbzrle")
        parameters["xbzrle-cache-size"] = 256 << 20
    if mode.startswith("multifd-zstd"):
        wanted.append("multifd")
        parameters |= {"multifd-channels": 4, "multifd-compression": "zstd"}
    if mode.endswith("throttled"):
        wanted.append("auto-converge")
    qmp.call("migrate-set-capabilities",
             capabilities=[{"capability": name, "state": True} for name in wanted])
    qmp.call("migrate-set-parameters", **parameters)


def serve_disks(there: Qmp) -> None:
    there.call("nbd-server-start",
               addr={"type": "inet", "data": {"host": THERE, "port": "10809"}})
    for disk in DISKS:
        there.call("block-export-add", **{"type": "nbd", "id": disk, "node-name": disk,
                                          "name": disk, "writable": True})


def mirror(here: Qmp) -> None:
    """Starts to mirror each disk. The mirror writes through (`write-blocking`):
    in the background it never came to its end under the guest's ten small
    writes a second at 80 ms round trip."""
    for disk in DISKS:
        there = {"type": "inet", "host": THERE, "port": "10809"}
        here.call("blockdev-add", **{"driver": "nbd", "node-name": f"{disk}-there",
                                     "export": disk, "server": there})
        here.call("blockdev-mirror", **{"job-id": disk, "device": disk,
                                        "target": f"{disk}-there", "sync": "full",
                                        "copy-mode": "write-blocking"})


def progress(here: Qmp) -> str:
    return ", ".join(f"{job['id']} {job['status']} {job['current-progress'] / 1e6:.0f} of "
                     f"{job['total-progress'] / 1e6:.0f} MB" for job in here.call("query-jobs"))


def reaches_switchover(here: Qmp, deadline: float) -> bool:
    """Waits until all but the last of the memory is there; False when it never is."""
    while (status := here.call("query-migrate")["status"]) != "pre-switchover":
        if status in ("failed", "cancelled"):
            raise RuntimeError(f"QEMU's migration {status}")
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def hand_over(here: Qmp, there: Qmp) -> None:
    """Ends the mirrors while the guest stands still, then lets it run there."""
    for disk in DISKS:
        here.call("block-job-cancel", device=disk)
    while here.call("query-jobs"):
        time.sleep(0.002)
    here.call("migrate-continue", state="pre-switchover")
    while (status := here.call("query-migrate")["status"]) != "completed":
        if status == "failed":
            raise RuntimeError("QEMU's migration failed at its very end")
        time.sleep(0.005)
    there.call("nbd-server-stop")
    while there.call("query-status")["status"] == "inmigrate":
        time.sleep(0.002)
    there.call("cont")


def migrate(cell: Cell, mode: str, load: str) -> Figures:
    """Disk mirror, then live migration, as libvirt drives them."""
    source = cell.guest("source", "a", load)
    source.warm()
    target = cell.guest("target", "b", load, incoming=True)
    here, there = source.qmp(), target.qmp()
    serve_disks(there)
    for side in (there, here):
        prepare(side, mode)
    cell.weigh()
    begun = time.monotonic()
    deadline = begun + cell.patience
    mirror(here)
    while not all(job["status"] == "ready" for job in here.call("query-jobs")):
        if time.monotonic() > deadline:
            return cell.gave_up(f"the disk mirror ({progress(here)})", begun)
        time.sleep(0.05)
    mirrored, disk_bytes = time.monotonic() - begun, cell.weigh()
    there.call("migrate-incoming", uri=f"tcp:{THERE}:4444")
    here.call("migrate", uri=f"tcp:{THERE}:4444")
    moving = time.monotonic()
    if not reaches_switchover(here, deadline):
        passes = here.call("query-migrate")["ram"]["dirty-sync-count"]
        return cell.gave_up(f"the migration (pass {passes} of memory)", begun, mirror_s=mirrored)
    hand_over(here, there)
    ran = time.monotonic()
    target.console.wait(1, 60)
    for side in (here, there):
        side.call("query-status")  # reads the events that came about since
    stopped, runs = here.event_at("STOP"), there.event_at("RESUME")
    return {"outcome": "done", "copied_s": ran - begun, "move_s": ran - begun,
            "wire_bytes": disk_bytes + cell.weigh(), "mirror_s": mirrored,
            "mirror_bytes": disk_bytes, "migrate_s": ran - moving,
            "stopped_s": runs - stopped if runs and stopped else None,
            **silence(source.console, target.console)}


def raw_disk(cell: Cell) -> str:
    """The root disk of a guest that stands still."""
    disk = f"{cell.directory}/disk.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", f"{cell.image}/root.qcow2", disk],
                   check=True)
    return disk


def timed_copy(cell: Cell, *command: str) -> Figures:
    time.sleep(0.5)  # the server listens by then
    cell.weigh()
    begun = time.monotonic()
    if not cell.run_in("a", *command).wait_well(cell.patience):
        return cell.gave_up("the copy", begun)
    return {"outcome": "done", "copied_s": time.monotonic() - begun, "wire_bytes": cell.weigh()}


def rsync(cell: Cell) -> Figures:
    """The disk alone, compressed, to a daemon: no ssh in the way."""
    disk, place = raw_disk(cell), f"{cell.directory}/there"
    os.makedirs(place)
    settings = f"{cell.directory}/rsyncd.conf"
    with open(settings, "w") as file:
        file.write("use chroot = no\nuid = root\ngid = root\n"
                   f"[there]\npath = {place}\nread only = no\n")
    cell.run_in("b", "rsync", "--daemon", "--no-detach", f"--config={settings}",
                f"--address={THERE}")
    return timed_copy(cell, "rsync", "--inplace", "-z", disk, f"rsync://{THERE}/there/disk.raw")


def nbdcopy(cell: Cell) -> Figures:
    """The disk alone, as it is."""
    disk, there = raw_disk(cell), f"{cell.directory}/there.raw"
    with open(there, "wb") as file:
        file.truncate(os.path.getsize(disk))
    cell.run_in("b", "qemu-nbd", "-t", "-f", "raw", "-b", THERE, there)
    return timed_copy(cell, "nbdcopy", "--destination-is-zero", disk, f"nbd://{THERE}")
