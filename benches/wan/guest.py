"""A QEMU guest of the benchmark, its control socket and its console.

The guest is the one of the tests (tests/guest/make): a Debian kernel with a
workload that writes memory and disks, checks itself, and prints a heartbeat
every 100 ms. RAM is a shared file for every peer alike.
"""

import json
import os
import signal
import socket
import subprocess
import threading
import time

RAM_MIB = 512
DATA_BYTES = 64 << 20


class Qmp:
    """QEMU's control socket: commands in turn, events kept."""

    def __init__(self, path, patience=20):
        deadline = time.monotonic() + patience
        while True:
            try:
                self.socket = socket.socket(socket.AF_UNIX)
                self.socket.connect(path)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        self.file = self.socket.makefile("rw")
        self.events = []
        self.file.readline()
        self.call("qmp_capabilities")

    def call(self, command, **arguments):
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

    def close(self):
        self.socket.close()


class Console:
    """Reads a console's log as it grows and notes when each heartbeat was seen."""

    def __init__(self, path):
        self.path = path
        self.beats = []
        self.ended = False
        threading.Thread(target=self.follow, daemon=True).start()

    def follow(self):
        read, partial = 0, ""
        while not self.ended:
            try:
                with open(self.path, errors="replace") as log:
                    log.seek(read)
                    text = log.read()
                    read += len(text)
            except OSError:
                text = ""
            now = time.monotonic()
            *lines, partial = (partial + text).split("\n")
            for line in lines:
                words = line.split()
                if len(words) > 1 and words[0] == "HB" and words[1].isdigit():
                    self.beats.append((int(words[1]), now, line.strip()))
            time.sleep(0.002)

    def wait(self, number, patience):
        deadline = time.monotonic() + patience
        while not self.beats or self.beats[-1][0] < number:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no heartbeat {number} in {self.path}")
            time.sleep(0.02)

    def close(self):
        self.ended = True


def silence(before, after):
    """Seconds from the last heartbeat of one console to the first of another,
    and how many numbers are missing between them."""
    last, first = before.beats[-1], after.beats[0]
    return first[1] - last[1], first[0] - last[0] - 1


class Guest:
    """One QEMU, in a network namespace; ended by `end`."""

    def __init__(self, image, directory, namespace, load, incoming=False):
        os.makedirs(directory)
        self.directory = directory
        self.ram = f"/dev/shm/farhaven-bench-{os.getpid()}-{os.path.basename(directory)}.ram"
        root, data = f"{directory}/root.qcow2", f"{directory}/data.raw"
        base = f"{image}/root.qcow2"
        if incoming:
            info = json.loads(subprocess.check_output(
                ["qemu-img", "info", "--output=json", base]))
            make = ["qemu-img", "create", "-q", "-f", "qcow2", root, str(info["virtual-size"])]
        else:
            make = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, root]
        subprocess.run(make, check=True)
        with open(data, "wb") as disk:
            disk.truncate(DATA_BYTES)
        self.qmp_path = f"{directory}/qmp.sock"
        command = ["ip", "netns", "exec", namespace, "qemu-system-x86_64",
                   "-name", "bench", "-machine", "pc-q35-7.2,memory-backend=ram0",
                   "-accel", "tcg", "-cpu", "qemu64", "-smp", "1", "-m", str(RAM_MIB),
                   "-object", f"memory-backend-file,id=ram0,size={RAM_MIB}M,mem-path={self.ram},share=on",
                   "-nodefaults", "-no-user-config", "-display", "none",
                   "-chardev", f"socket,id=console,path={directory}/console.sock,server=on,wait=off,logfile={directory}/console.log",
                   "-serial", "chardev:console",
                   "-kernel", f"{image}/vmlinuz", "-initrd", f"{image}/initrd",
                   "-append", f"console=ttyS0 quiet panic=-1 farhaven.load={load}",
                   "-blockdev", f"driver=qcow2,node-name=root,discard=unmap,file.driver=file,file.filename={root}",
                   "-device", "virtio-blk-pci,drive=root,id=disk-root",
                   "-blockdev", f"driver=raw,node-name=data,file.driver=file,file.filename={data}",
                   "-device", "virtio-blk-pci,drive=data,id=disk-data",
                   "-netdev", "user,id=net0,restrict=on", "-device", "virtio-net-pci,netdev=net0,id=nic0",
                   "-qmp", f"unix:{self.qmp_path},server=on,wait=off"]
        if incoming:
            command += ["-incoming", "defer", "-S"]
        self.log = open(f"{directory}/qemu.log", "wb")
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL,
                                        stdout=self.log, stderr=self.log)
        self.console = Console(f"{directory}/console.log")

    def qmp(self):
        return Qmp(self.qmp_path)

    def end(self):
        self.console.close()
        if self.process.poll() is None:
            # `ip netns exec` becomes the program it runs: this is QEMU.
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.log.close()
        if os.path.exists(self.ram):
            os.unlink(self.ram)
