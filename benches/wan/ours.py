"""Farhaven over the same link: two daemons, one in each namespace."""

import glob
import json
import os
import subprocess
import threading
import time

from guest import Console, silence


class Site:
    def __init__(self, bench, name, side, address):
        self.bench, self.name = bench, name
        self.directory = f"{bench.directory}/{name}"
        run = lambda *words: subprocess.run([bench.farhaven, *words], check=True,
                                            stdout=subprocess.DEVNULL)
        run("site", "init", name, "--dir", self.directory)
        settings = {
            "FARHAVEN__LISTEN__ADDRESS": f"{address}:4747",
            "FARHAVEN__LISTEN__ADVERTISE": f"{address}:4747",
            "FARHAVEN__STORE__MIN_FREE": "64MiB",
            "FARHAVEN__ACTIVATE__RAM_DIR": f"/dev/shm/farhaven-bench-{os.getpid()}-{name}",
        }
        self.ram = settings["FARHAVEN__ACTIVATE__RAM_DIR"]
        self.process = bench.run_in(side, bench.farhaven, "site", "run", "--config",
                                    f"{self.directory}/site.toml", env=settings,
                                    log=f"{self.directory}/daemon.log")
        deadline = time.monotonic() + 20
        while not os.path.exists(f"{self.directory}/api.sock"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name} does not start, see {self.directory}/daemon.log")
            time.sleep(0.02)

    def do(self, *words):
        done = subprocess.run([self.bench.farhaven, *words, "--api", f"{self.directory}/api.sock"],
                              capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"farhaven {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def ask(self, *words):
        return json.loads(self.do(*words, "--json"))

    def end(self):
        self.process.end()
        subprocess.run(["rm", "-rf", self.ram], check=False)


class Arrival(threading.Thread):
    """Opens the guest's console at the other site as soon as it is made, so
    that its first heartbeat is seen when it comes."""

    def __init__(self, bench, run):
        super().__init__(daemon=True)
        self.bench, self.run_directory, self.found = bench, run, None
        self.start()

    def run(self):
        deadline = time.monotonic() + 600
        while self.found is None and time.monotonic() < deadline:
            for path in glob.glob(f"{self.run_directory}/*/**/console.log", recursive=True):
                self.found = self.bench.keep_console(Console(path))
            time.sleep(0.002)

    def console(self):
        self.join(10)
        if self.found is None:
            raise TimeoutError("the guest has no console at the other site")
        return self.found


def protect_and_move(bench, load):
    """First copy, points while it runs, then a planned move."""
    source = bench.guest("source", "a", load)
    source.console.wait(20, 180)
    if bench.load_settles:
        time.sleep(bench.load_settles)
    east = bench.keep(Site(bench, "east", "a", "10.99.0.1"))
    west = bench.keep(Site(bench, "west", "b", "10.99.0.2"))
    token = west.ask("pair")["invitation"]
    east.do("pair", token)
    east.do("guest", "add", "bench", "--qmp", source.qmp_path)
    bench.weigh()
    begun = time.monotonic()
    east.do("protect", "bench", "--to", "west", "--rpo", "5s")
    while True:
        view = east.ask("status")["guests"][0]
        if view["points_sealed"] > 0:
            break
        if time.monotonic() - begun > bench.patience:
            return bench.gave_up("the first copy", begun)
        time.sleep(0.05)
    copied = time.monotonic() - begun
    wire = bench.weigh()
    time.sleep(bench.steady)
    steady = bench.weigh()
    arrival = Arrival(bench, f"{west.directory}/run")
    moving = time.monotonic()
    report = east.ask("move", "bench")
    took = time.monotonic() - moving
    pid = None
    for standby in west.ask("status")["standbys"]:
        if standby.get("active"):
            pid = standby["active"]["pid"]
    bench.keep_process(pid)
    there = arrival.console()
    there.wait(1, 30)
    blackout, missing = silence(source.console, there)
    return bench.result(
        copied_s=copied, wire_bytes=wire, steady_bytes_per_s=steady / bench.steady,
        move_s=took, move_ms=report["total_ms"], blackout_s=report["blackout_ms"] / 1e3,
        beats_silent_s=blackout, missing_beats=missing)
