"""What Farhaven is held against, each doing the same work over the same link:
QEMU's own migration with the disks mirrored, and copies of the disk alone."""

import os
import subprocess
import time

from guest import Guest, silence

MODES = ("plain", "xbzrle", "multifd-zstd")
DISKS = ("root", "data")
THERE = "10.99.0.2"


def prepare(qmp, mode, downtime_ms):
    on = lambda name: {"capability": name, "state": True}
    wanted = [on("pause-before-switchover"), on("events")]
    parameters = {"max-bandwidth": 10 << 30, "downtime-limit": downtime_ms}
    if mode == "xbzrle":
        wanted.append(on("xbzrle"))
        parameters["xbzrle-cache-size"] = 256 << 20
    if mode == "multifd-zstd":
        wanted.append(on("multifd"))
        parameters |= {"multifd-channels": 4, "multifd-compression": "zstd"}
    qmp.call("migrate-set-capabilities", capabilities=wanted)
    qmp.call("migrate-set-parameters", **parameters)


def migrate(bench, mode, load):
    """Disk mirror, then live migration, as libvirt drives them. The mirror
    writes through (`write-blocking`): in the background it never came to its
    end under the guest's ten small writes a second at 80 ms round trip."""
    source = bench.guest("source", "a", load)
    source.console.wait(20, 180)
    if bench.load_settles:
        time.sleep(bench.load_settles)
    target = bench.guest("target", "b", load, incoming=True)
    here, there = source.qmp(), target.qmp()
    there.call("nbd-server-start", addr={"type": "inet", "data": {"host": THERE, "port": "10809"}})
    for disk in DISKS:
        there.call("block-export-add", **{"type": "nbd", "id": disk, "node-name": disk,
                                          "name": disk, "writable": True})
    for side in (there, here):
        prepare(side, mode, 300)
    bench.weigh()
    begun = time.monotonic()
    for disk in DISKS:
        here.call("blockdev-add", **{"driver": "nbd", "node-name": f"{disk}-there", "export": disk,
                                     "server": {"type": "inet", "host": THERE, "port": "10809"}})
        here.call("blockdev-mirror", **{"job-id": disk, "device": disk, "target": f"{disk}-there",
                                        "sync": "full", "copy-mode": "write-blocking"})
    deadline = begun + bench.patience
    while not all(job["status"] == "ready" for job in here.call("query-jobs")):
        if time.monotonic() > deadline:
            progress = ", ".join(
                f"{job['id']} {job['status']} {job['current-progress'] / 1e6:.0f} of {job['total-progress'] / 1e6:.0f} MB"
                for job in here.call("query-jobs"))
            return bench.gave_up(f"the disk mirror ({progress})", begun)
        time.sleep(0.05)
    mirrored = time.monotonic() - begun
    there.call("migrate-incoming", uri=f"tcp:{THERE}:4444")
    here.call("migrate", uri=f"tcp:{THERE}:4444")
    moving = time.monotonic()
    while True:
        status = here.call("query-migrate")["status"]
        if status == "pre-switchover":
            break
        if status in ("failed", "cancelled"):
            raise RuntimeError(f"QEMU's migration {status}")
        if time.monotonic() > deadline:
            here.call("migrate_cancel")
            return bench.gave_up("the migration", begun)
        time.sleep(0.005)
    for disk in DISKS:
        here.call("block-job-cancel", device=disk)
    while here.call("query-jobs"):
        time.sleep(0.002)
    here.call("migrate-continue", state="pre-switchover")
    while here.call("query-migrate")["status"] != "completed":
        time.sleep(0.005)
    there.call("nbd-server-stop")
    while there.call("query-status")["status"] == "inmigrate":
        time.sleep(0.002)
    there.call("cont")
    ran = time.monotonic()
    target.console.wait(1, 30)
    blackout, missing = silence(source.console, target.console)
    return bench.result(
        copied_s=ran - begun, wire_bytes=bench.weigh(), mirror_s=mirrored,
        move_s=ran - begun, migrate_s=ran - moving, blackout_s=blackout, missing_beats=missing)


def rsync(bench, load):
    """The disk alone, of a guest that stands still."""
    disk = raw_disk(bench)
    place = f"{bench.directory}/there"
    os.makedirs(place)
    conf = f"{bench.directory}/rsyncd.conf"
    with open(conf, "w") as file:
        file.write(f"use chroot = no\nuid = root\ngid = root\n[there]\npath = {place}\nread only = no\n")
    daemon = bench.run_in("b", "rsync", "--daemon", "--no-detach", f"--config={conf}", f"--address={THERE}")
    time.sleep(0.5)
    bench.weigh()
    begun = time.monotonic()
    bench.run_in("a", "rsync", "--inplace", "-z", disk, f"rsync://{THERE}/there/disk.raw").wait_well()
    took = time.monotonic() - begun
    daemon.end()
    return bench.result(copied_s=took, wire_bytes=bench.weigh())


def nbdcopy(bench, load):
    """The disk alone, of a guest that stands still."""
    disk = raw_disk(bench)
    there = f"{bench.directory}/there.raw"
    with open(there, "wb") as file:
        file.truncate(os.path.getsize(disk))
    server = bench.run_in("b", "qemu-nbd", "-t", "-f", "raw", "-b", THERE, there)
    time.sleep(0.5)
    bench.weigh()
    begun = time.monotonic()
    bench.run_in("a", "nbdcopy", "--destination-is-zero", disk, f"nbd://{THERE}").wait_well()
    took = time.monotonic() - begun
    server.end()
    return bench.result(copied_s=took, wire_bytes=bench.weigh())


def raw_disk(bench):
    disk = f"{bench.directory}/disk.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", f"{bench.image}/root.qcow2", disk], check=True)
    return disk
