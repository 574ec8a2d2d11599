"""Hosts on one machine: network namespaces with their own addresses, joined by a bridge; each can be cut off.

If the kernel or the user's rights do not allow namespaces, tests that need them are skipped with a message.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True, kw_only=True)
class Host:
    """One namespace; its processes see one network interface, eth0, in addition to loopback."""

    name: str
    address: str

    def start(
        self, command: Sequence[str], *, folder: Path, environment: dict[str, str], output: Path
    ) -> subprocess.Popen:
        """Start a command on the host, in its own process group, with output to a file."""
        with output.open("wb") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                cwd=folder,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def cut_off(self) -> None:
        """Take the host's link down: nothing leaves or reaches it, and no peer is notified."""
        _ip("-n", self.name, "link", "set", "eth0", "down")

    def end(self) -> None:
        """Kill all processes on the host."""
        for pid in _ip("netns", "pids", self.name).split():
            subprocess.run(["kill", "-KILL", pid], check=False, capture_output=True)


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Create `count` hosts, and remove them afterwards."""
    why = _refused()
    if why:
        message = f"network namespaces are not permitted here ({why}): several hosts were NOT tested"
        print(message, file=sys.__stderr__)
        pytest.skip(message)
    tag = f"mt{os.getpid()}"
    switch = f"{tag}-sw"
    made = [Host(name=f"{tag}-{number}", address=f"10.77.0.{number + 1}") for number in range(count)]
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for number, host in enumerate(made):
            _ip("netns", "add", host.name)
            _ip("-n", host.name, "link", "add", "eth0", "type", "veth", "peer", "name", f"p{number}", "netns", switch)
            _ip("-n", switch, "link", "set", f"p{number}", "master", "br0", "up")
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.name, "link", "set", "eth0", "up")
            _ip("-n", host.name, "link", "set", "lo", "up")
        yield made
    finally:
        for host in made:
            if Path(f"/run/netns/{host.name}").exists():
                host.end()
                _ip("netns", "del", host.name)
        if Path(f"/run/netns/{switch}").exists():
            _ip("netns", "del", switch)


def _refused() -> str:
    """Return why namespaces cannot be created here; empty if they can."""
    if shutil.which("ip") is None:
        return "the command `ip` is not installed"
    name = f"mt{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode:
        return tried.stderr.strip()
    link = ["ip", "-n", name, "link", "add", "try0", "type", "veth", "peer", "name", "try1"]
    tried = subprocess.run(link, capture_output=True, text=True)
    _ip("netns", "del", name)
    return tried.stderr.strip() if tried.returncode else ""


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout
