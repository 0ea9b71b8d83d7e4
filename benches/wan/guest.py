"""A QEMU guest of the benchmark, its control socket and its console.

RAM is a shared file for every peer alike; disks are the root disk, an overlay
on the image, and a raw one for the workload's ledger.
"""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from typing import Any

import loads

RAM_MIB = 512
DATA_BYTES = 64 << 20


class Qmp:
    """QEMU's control socket: commands in turn, events kept."""

    def __init__(self, path: str, patience: float = 20) -> None:
        deadline = time.monotonic() + patience
        while True:
            self.socket = socket.socket(socket.AF_UNIX)
            try:
                self.socket.connect(path)
                break
            except OSError:
                self.socket.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        self.file = self.socket.makefile("rw")
        self.events: list[dict[str, Any]] = []
        self.file.readline()
        self.call("qmp_capabilities")

    def call(self, command: str, **arguments: Any) -> Any:
        """One command and its answer."""
        self.file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.file.flush()
        while True:
            line = self.file.readline()
            if not line:
                raise ConnectionError(f"QEMU ended during {command}")
            answer = json.loads(line)
            if "event" in answer:
                self.events.append(answer)
            elif "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")
            else:
                return answer["return"]

    def event_at(self, name: str) -> float | None:
        """When the newest event of this name came about, by the host's clock."""
        stamps = [event["timestamp"] for event in self.events if event["event"] == name]
        return stamps[-1]["seconds"] + stamps[-1]["microseconds"] / 1e6 if stamps else None


class Console:
    """Reads a console's log as it grows and notes when each heartbeat was seen."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.beats: list[tuple[int, float]] = []
        self.fault = ""
        self.loaded = self.ended = False
        threading.Thread(target=self.follow, daemon=True).start()

    def follow(self) -> None:
        read, partial = 0, ""
        while not self.ended:
            try:
                with open(self.path, errors="replace") as log:
                    log.seek(read)
                    text = log.read()
                    read = log.tell()
            except OSError:
                text = ""
            now = time.monotonic()
            *lines, partial = (partial + text).split("\n")
            for line in lines:
                self.note(line.split(), now)
            time.sleep(0.002)

    def note(self, words: list[str], now: float) -> None:
        if words[:2] == ["LOAD", "ready"]:
            self.loaded = True
        elif words[:1] == ["LOAD"]:
            self.fault = self.fault or " ".join(words)
        elif len(words) > 1 and words[0] == "HB" and words[1].isdigit():
            self.beats.append((int(words[1]), now))
            self.fault = self.fault or next((word for word in words if "BAD" in word), "")

    def wait(self, number: int, patience: float, loaded: bool = False) -> None:
        """Until the heartbeat of this number, and until the load is at its pace."""
        deadline = time.monotonic() + patience
        while not self.beats or self.beats[-1][0] < number or (loaded and not self.loaded):
            if time.monotonic() > deadline:
                seen = self.beats[-1][0] if self.beats else "none"
                raise TimeoutError(f"waited {patience:.0f} s for heartbeat {number}; the last is "
                                   f"{seen}, load ready: {self.loaded} {self.fault}")
            time.sleep(0.02)

    def end(self) -> None:
        self.ended = True


def silence(before: Console, after: Console) -> dict[str, Any]:
    """The blackout as whoever uses the guest sees it: from the last heartbeat
    at one place to the first at the other, a tenth of a second apart when
    nothing happens; and whether the guest goes on there, whole."""
    last, first = before.beats[-1], after.beats[0]
    missing = first[0] - last[0] - 1
    state = "started anew" if missing < 0 else "lost beats" if missing > 0 else "ok"
    return {"blackout_s": first[1] - last[1], "missing_beats": missing,
            "guest": before.fault or after.fault or state}


class Guest:
    """One QEMU, in a network namespace; ended by `end`."""

    def __init__(self, image: str, initrd: str, directory: str, namespace: str, load: str,
                 incoming: bool = False) -> None:
        os.makedirs(directory)
        self.directory = directory
        self.ram = f"/dev/shm/farhaven-bench-{os.getpid()}-{os.path.basename(directory)}.ram"
        self.qmp_path = f"{directory}/qmp.sock"
        root, data = self.make_disks(image, incoming)
        command = ["ip", "netns", "exec", namespace, *self.command(root, data, image, initrd, load)]
        if incoming:
            command += ["-incoming", "defer", "-S"]
        with open(f"{directory}/qemu.log", "wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log,
                                            stderr=log, start_new_session=True)
        self.console = Console(f"{directory}/console.log")

    def make_disks(self, image: str, incoming: bool) -> tuple[str, str]:
        root, data = f"{self.directory}/root.qcow2", f"{self.directory}/data.raw"
        base = f"{image}/root.qcow2"
        make = ["qemu-img", "create", "-q", "-f", "qcow2"]
        if incoming:
            told = subprocess.check_output(["qemu-img", "info", "--output=json", base])
            make += [root, str(json.loads(told)["virtual-size"])]
        else:
            make += ["-F", "qcow2", "-b", base, root]
        subprocess.run(make, check=True)
        with open(data, "wb") as disk:
            disk.truncate(DATA_BYTES)
        return root, data

    def command(self, root: str, data: str, image: str, initrd: str, load: str) -> list[str]:
        ram = f"memory-backend-file,id=ram0,size={RAM_MIB}M,mem-path={self.ram},share=on"
        console = (f"socket,id=console,path={self.directory}/console.sock,server=on,wait=off,"
                   f"logfile={self.directory}/console.log")
        words = f"console=ttyS0 quiet panic=-1 {loads.kernel_words(load)}"
        return ["qemu-system-x86_64", "-name", "bench",
                "-machine", "pc-q35-7.2,memory-backend=ram0",
                "-accel", "tcg", "-cpu", "qemu64", "-smp", "1", "-m", str(RAM_MIB),
                "-object", ram, "-nodefaults", "-no-user-config", "-display", "none",
                "-chardev", console, "-serial", "chardev:console",
                "-kernel", f"{image}/vmlinuz", "-initrd", initrd, "-append", words,
                "-blockdev", "driver=qcow2,node-name=root,discard=unmap,"
                             f"file.driver=file,file.filename={root}",
                "-device", "virtio-blk-pci,drive=root,id=disk-root",
                "-blockdev", f"driver=raw,node-name=data,file.driver=file,file.filename={data}",
                "-device", "virtio-blk-pci,drive=data,id=disk-data",
                "-netdev", "user,id=net0,restrict=on",
                "-device", "virtio-net-pci,netdev=net0,id=nic0",
                "-qmp", f"unix:{self.qmp_path},server=on,wait=off"]

    def warm(self) -> None:
        """Until its load is at its steady pace."""
        self.console.wait(loads.WARM_BEATS, 240, loaded=True)

    def qmp(self) -> Qmp:
        return Qmp(self.qmp_path)

    def end(self) -> None:
        self.console.end()
        if self.process.poll() is None:
            # `ip netns exec` becomes the program it runs: this is QEMU.
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        if os.path.exists(self.ram):
            os.unlink(self.ram)
