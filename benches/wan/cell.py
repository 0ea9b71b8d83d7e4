"""One cell of the matrix: a link of its own, and whatever a peer starts on it.
All of it is ended when the cell is left, however that comes about."""

import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from guest import Guest

# Name: rate, one-way delay, loss in percent, queue.
LINKS = {
    "20mbit": ("20mbit", "40ms", "0", "1mib"),
    "100mbit": ("100mbit", "40ms", "0.1", "1mib"),
    "500mbit": ("500mbit", "20ms", "0", "4mib"),
}


def wanlink() -> str:
    """The program of the emulated link, built if it is not."""
    here = os.path.dirname(os.path.abspath(__file__))
    target = os.path.join(os.path.dirname(os.path.dirname(here)), "target/wanlink")
    subprocess.run(["cargo", "build", "--release", "--quiet", "--locked",
                    "--manifest-path", f"{here}/wanlink/Cargo.toml",
                    "--target-dir", target], check=True)
    return f"{target}/release/wanlink"


class Ends(Protocol):
    def end(self) -> None: ...


Held = TypeVar("Held", bound=Ends)


class Process:
    """Something we started; ended by `end`."""

    def __init__(self, child: "subprocess.Popen[bytes]") -> None:
        self.child = child

    def wait_well(self, patience: float) -> bool:
        """Whether it ended in time; a failure is an error."""
        try:
            code = self.child.wait(patience)
        except subprocess.TimeoutExpired:
            return False
        if code != 0:
            raise RuntimeError(f"{self.child.args!r} ended with {code}")
        return True

    def end(self) -> None:
        if self.child.poll() is None:
            self.child.terminate()
            try:
                self.child.wait(10)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()


class Link:
    """A WAN between two namespaces, as long as its process lives."""

    def __init__(self, program: str, shape: tuple[str, str, str, str]) -> None:
        rate, delay, loss, queue = shape
        self.name = f"fb{os.getpid()}"
        self.child = subprocess.Popen(
            [program, "--name", self.name, "--rate", rate, "--delay", delay, "--loss", loss,
             "--queue", queue, "--", "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, start_new_session=True)
        deadline = time.monotonic() + 10
        try:
            while not self.ready():
                if self.child.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("the link does not come up (see the line above)")
                time.sleep(0.05)
        except BaseException:
            self.end()
            raise

    def ready(self) -> bool:
        try:
            self.bytes()
            return True
        except (subprocess.CalledProcessError, KeyError, IndexError):
            return False

    def namespace(self, side: str) -> str:
        return self.name + side

    def bytes(self) -> int:
        """Bytes that left either side, ever, with all headers from IP on."""
        total = 0
        for side in "ab":
            told = subprocess.run(
                ["ip", "-n", self.namespace(side), "-s", "-j", "link", "show", "wan0"],
                check=True, capture_output=True, text=True).stdout
            total += json.loads(told)[0]["stats64"]["tx"]["bytes"]
        return total

    def end(self) -> str:
        """Ends it; what it counted."""
        try:
            told = self.child.communicate(timeout=10)[1]
        except subprocess.TimeoutExpired:
            self.child.kill()
            told = self.child.communicate()[1]
        for side in "ab":
            if os.path.exists(f"/run/netns/{self.namespace(side)}"):
                subprocess.run(["ip", "netns", "del", self.namespace(side)], check=False)
        return told

    @staticmethod
    def counted(told: str) -> dict[str, int]:
        """Bytes that arrived either way, packets that the link lost of itself,
        and those its queue had no room for."""
        there, back = (re.findall(rf"{way}: packets \d+ bytes (\d+)", told)
                       for way in ("a->b", "b->a"))
        figures = {"there_bytes": sum(map(int, there)), "back_bytes": sum(map(int, back))}
        return figures | {f"{kind}_packets": sum(map(int, re.findall(rf"{kind} (\d+)", told)))
                          for kind in ("lost", "overflowed")}


class Cell:
    """One peer, one load, one link."""

    def __init__(self, options: Any, link: Link, directory: str) -> None:
        self.link, self.directory = link, directory
        self.image: str = options.image
        self.initrd: str = options.initrd
        self.farhaven: str = options.farhaven
        self.floors: str = options.floors
        self.patience: float = options.patience
        self.steady: float = options.steady
        self.turn: float = options.turn
        self.held: list[Ends] = []
        self.before = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for held in reversed(self.held):
            try:
                held.end()
            except Exception as failure:  # the rest must be ended all the same
                print(f"  left behind: {failure}", file=sys.stderr)
        self.sweep()

    def sweep(self, program: str = "") -> None:
        """Ends what others started in our directory: a daemon leaves the guests
        that it runs alone when it ends, as it should."""
        ours, program_bytes = self.directory.encode(), program.encode()
        for path in glob.glob("/proc/[0-9]*/cmdline"):
            pid = int(path.split("/")[2])
            try:
                with open(path, "rb") as file:
                    command = file.read()
                if ours in command and command.startswith(program_bytes) and pid != os.getpid():
                    os.kill(pid, signal.SIGKILL)
            except OSError:
                continue  # it ended by itself

    def save_logs(self, into: str) -> None:
        """Keeps what was said, by everything that ran."""
        for path in glob.glob(f"{self.directory}/**/*.log", recursive=True):
            place = os.path.join(into, os.path.relpath(path, self.directory))
            os.makedirs(os.path.dirname(place), exist_ok=True)
            shutil.copy(path, place)

    def keep(self, thing: Held) -> Held:
        self.held.append(thing)
        return thing

    def guest(self, name: str, side: str, load: str, incoming: bool = False) -> Guest:
        return self.keep(Guest(self.image, self.initrd, f"{self.directory}/{name}",
                               self.link.namespace(side), load, incoming))

    def run_in(self, side: str, *command: str, env: dict[str, str] | None = None) -> Process:
        """Starts a program at one side; what it says is in `<its name>.log`."""
        name = os.path.basename(command[0])
        with open(f"{self.directory}/{side}-{name}.log", "wb") as log:
            child = subprocess.Popen(
                ["ip", "netns", "exec", self.link.namespace(side), *command],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**os.environ, **(env or {})}, start_new_session=True)
        return self.keep(Process(child))

    def weigh(self) -> int:
        """Bytes on the wire since the last call."""
        now = self.link.bytes()
        since, self.before = now - self.before, now
        return since

    def gave_up(self, what: str, begun: float, **figures: Any) -> dict[str, Any]:
        """The end of what does not come to its own."""
        return {"outcome": f"{what} did not end in {time.monotonic() - begun:.0f} s",
                "given_up_wire_bytes": self.weigh(), **figures}
