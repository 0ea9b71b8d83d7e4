"""Farhaven over the same link: two daemons, one in each namespace."""

import glob
import json
import os
import shutil
import subprocess
import threading
import time
from typing import Any

from cell import Cell, Process
from guest import Console, silence

Figures = dict[str, Any]


class Site:
    """A daemon at one side of the link, with its default policy."""

    def __init__(self, cell: Cell, name: str, side: str, address: str) -> None:
        self.farhaven, self.name = cell.farhaven, name
        self.directory = f"{cell.directory}/{name}"
        self.ram = f"/dev/shm/farhaven-bench-{os.getpid()}-{name}"
        subprocess.run([self.farhaven, "site", "init", name, "--dir", self.directory],
                       check=True, stdout=subprocess.DEVNULL)
        settings = {
            "FARHAVEN__LISTEN__ADDRESS": f"{address}:4747",
            "FARHAVEN__LISTEN__ADVERTISE": f"{address}:4747",
            "FARHAVEN__STORE__MIN_FREE": "64MiB",
            "FARHAVEN__ACTIVATE__RAM_DIR": self.ram,
        }
        self.process: Process = cell.run_in(side, self.farhaven, "site", "run", "--config",
                                            f"{self.directory}/site.toml", env=settings)
        deadline = time.monotonic() + 20
        while not os.path.exists(f"{self.directory}/api.sock"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the daemon {name} does not start")
            time.sleep(0.02)

    def run(self, *words: str) -> str:
        done = subprocess.run([self.farhaven, *words, "--api", f"{self.directory}/api.sock"],
                              capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"farhaven {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def ask(self, *words: str) -> Any:
        return json.loads(self.run(*words, "--json"))

    def guest(self) -> Any:
        return self.ask("status")["guests"][0]

    def end(self) -> None:
        self.process.end()
        shutil.rmtree(self.ram, ignore_errors=True)


class Arrival(threading.Thread):
    """Opens the guest's console at the other site as soon as it is made, so
    that its first heartbeat is seen when it comes."""

    def __init__(self, run_directory: str) -> None:
        super().__init__(daemon=True)
        self.run_directory = run_directory
        self.found: Console | None = None
        self.ended = False
        self.start()

    def run(self) -> None:
        while self.found is None and not self.ended:
            for path in glob.glob(f"{self.run_directory}/*/**/console.log", recursive=True):
                self.found = Console(path)
            time.sleep(0.002)

    def console(self) -> Console:
        self.join(10)
        if self.found is None:
            raise TimeoutError("the guest has no console at the other site")
        return self.found

    def end(self) -> None:
        self.ended = True
        if self.found:
            self.found.end()


def sealed_after(site: Site, count: int, deadline: float) -> Any:
    """The guest's status once more than `count` points are sealed; None if too late."""
    while True:
        view = site.guest()
        if view["points_sealed"] > count:
            return view
        if time.monotonic() > deadline:
            return None
        time.sleep(0.05)


def first_copy(cell: Cell, east: Site) -> tuple[Any, Figures]:
    """From the command until a point is sealed that the guest can be run from."""
    cell.weigh()
    begun = time.monotonic()
    east.run("protect", "bench", "--to", "west", "--rpo", "5s")
    view = sealed_after(east, 0, begun + cell.patience)
    if view is None:
        where = east.guest()
        given_up = cell.gave_up("the first copy", begun, phase=where["phase"],
                                trouble=where["trouble"])
        return None, given_up
    return view, {"copied_s": time.monotonic() - begun, "wire_bytes": cell.weigh(),
                  "batch_bytes": view["wan_bytes"]}


def steady(cell: Cell, east: Site, first: Any) -> tuple[Any, Figures]:
    """Points while it runs, from a seal to a seal."""
    begun = time.monotonic()
    time.sleep(cell.steady)
    count = east.guest()["points_sealed"]
    last = sealed_after(east, count, begun + cell.patience)
    if last is None:
        return None, {"steady": "no point was sealed"}
    took = time.monotonic() - begun
    return last, {"steady_s": took, "steady_points": last["points_sealed"] - first["points_sealed"],
                  "steady_wire_bytes": cell.weigh(),
                  "steady_batch_bytes": last["wan_bytes"] - first["wan_bytes"],
                  "rpo_ms": last["rpo_ms"], "pause_ms": last["last_pause_ms"]}


def move(cell: Cell, east: Site, west: Site, here: Console) -> Figures:
    """A planned move, from the command until it runs there."""
    arrival = cell.keep(Arrival(f"{west.directory}/run"))
    begun = time.monotonic()
    # A longer blackout than the policy allows is a result, too.
    report = east.ask("move", "bench", "--accept-pause")
    took = time.monotonic() - begun
    there = arrival.console()
    there.wait(1, 60)
    return {"move_s": took, "move_bytes": cell.weigh(), "final_bytes": report["final_bytes"],
            "stopped_s": report["blackout_ms"] / 1e3, **silence(here, there)}


def turn_round(cell: Cell, west: Site) -> Figures:
    """Protection the other way, after the guest has run there for a while: from the
    command until a point is sealed where the guest came from."""
    time.sleep(cell.turn)
    west.run("commit", "bench")
    cell.weigh()
    begun = time.monotonic()
    west.run("reprotect", "bench", "--rpo", "5s")
    while True:
        guests = west.ask("status")["guests"]
        if guests and guests[0]["points_sealed"] > 0:
            return {"turn_s": time.monotonic() - begun, "turn_wire_bytes": cell.weigh(),
                    "turn_batch_bytes": guests[0]["wan_bytes"],
                    "turn_point": guests[0]["newest_point"]}
        if time.monotonic() > begun + cell.patience:
            return {"turn": f"no point was sealed: {guests}"}
        time.sleep(0.05)


def points_of(cell: Cell, site: Site) -> list[Figures]:
    """Each point in a site's store, with its floor; the site has ended."""
    told = subprocess.run([cell.floors, f"{site.directory}/store"], check=True,
                          capture_output=True, text=True).stdout
    return [json.loads(line) for line in told.splitlines()]


def turned_floor(cell: Cell, east: Site, point: int) -> Figures:
    """What the guest changed while it ran there, and what zstd-3 makes of that: in the
    store of the site that it came from, its stopped copy is the point before."""
    since = [p for p in points_of(cell, east)[1:] if p["point"] <= point]
    return {"turn_new_bytes": sum(p["new_bytes"] for p in since),
            "turn_floor_bytes": sum(p["floor_bytes"] for p in since)}


def floors(cell: Cell, west: Site, first: int, last: int | None) -> Figures:
    """What zstd-3 over groups of 64 makes of what was never sent before."""
    points = points_of(cell, west)
    figures: Figures = {
        "floor_bytes": sum(p["floor_bytes"] for p in points if p["point"] <= first)}
    if last is not None:
        figures["steady_floor_bytes"] = sum(
            p["floor_bytes"] for p in points if first < p["point"] <= last)
    return figures


def protect_and_move(cell: Cell, load: str) -> Figures:
    """First copy, points while it runs, a planned move; and back, if that is asked."""
    source = cell.guest("source", "a", load)
    source.warm()
    west = cell.keep(Site(cell, "west", "b", "10.99.0.2"))
    east = cell.keep(Site(cell, "east", "a", "10.99.0.1"))
    east.run("pair", west.ask("pair")["invitation"])
    east.run("guest", "add", "bench", "--qmp", source.qmp_path)
    first, figures = first_copy(cell, east)
    if first is None:
        return figures
    last, more = steady(cell, east, first)
    figures |= more | move(cell, east, west, source.console)
    if cell.turn:
        figures |= turn_round(cell, west)
    east.end()
    cell.sweep("qemu-system")  # the guest there, which leaves the store with its disks
    west.end()
    figures |= floors(cell, west, first["newest_point"], last and last["newest_point"])
    if "turn_point" in figures:
        figures |= turned_floor(cell, east, figures["turn_point"])
    return {"outcome": "done", **figures}
