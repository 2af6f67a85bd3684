"""A server of sandboxes: a script, standard library only.

It is started fresh, with an empty environment, before anything secret is near: neither its memory
nor that of what it forks ever held a test. Each message over its socket brings the sockets of one
more sandbox, in which a program or its examiner is to run. Where the system allows, the server
first leaves the file system for one that shows the interpreter alone, read only; each sandbox then
has processes, network and files of its own, and runs as an unused user where this one is root.

Beside each sandbox a guard waits until its leash is let go (or its owner dies), and then ends all
that the sandbox ever started.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import signal
import socket
import sys
import sysconfig
import tempfile
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
)  # fmt: skip
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1, 2, 4, 32, 4096, 16384, 1 << 18
)  # fmt: skip
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
CAPABILITY_VERSION = 0x20080522
FIRST_USER, USERS = 30_000, 20_000
"""Range of user ids from which an unused one is taken, outside those that systems hand out."""
OPEN_FILES = 64
MOST_INODES = 20_000
KILL_PATIENCE = 10.0
END_PATIENCE = 1.0
"""Seconds in which a program that closed its socket must have ended to be asked how."""
TICK = 0.002
PREFIX_PATHS = ("bin", "sbin", "lib", "lib32", "lib64", "libexec", "include", "share", "pyvenv.cfg")
"""What is shown of a prefix. Not the rest: images keep projects in /usr/src."""
DEVICES = ("null", "zero", "full", "random", "urandom")
USUAL_MODULES = (
    "bisect", "collections.abc", "concurrent.futures", "copy", "dataclasses", "datetime",
    "decimal", "enum", "fractions", "functools", "heapq", "itertools", "json", "math",
    "multiprocessing", "numpy", "operator", "pickle", "queue", "random", "re", "statistics",
    "string", "textwrap", "traceback", "typing", "unittest", "encodings.idna",
)  # fmt: skip

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Serves until the other end of its standard input is closed."""
    settings = json.loads(sys.argv[1])
    control = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    memory = os.open("/proc/self/statm", os.O_RDONLY)
    isolated = _isolate() if settings["namespaces"] else []
    roles = _import_roles()
    if "files" not in isolated and _landlock_version():
        isolated.append("landlock")
    for name in USUAL_MODULES:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    settings["memory_bytes"] += int(os.pread(memory, 64, 0).split()[0]) * resource.getpagesize()
    os.close(memory)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    control.send(json.dumps(isolated).encode())
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 64, 4)
        if not message:
            return
        if os.fork() == 0:
            control.close()
            _guard(roles[message.decode()], descriptors, settings, isolated)
        for descriptor in descriptors:
            os.close(descriptor)


def _import_roles() -> dict[str, Any]:
    """What runs in sandboxes. The packages above are left out: they import much that is not."""
    grading = Path(__file__).parent
    for name, folder in (("distrl_envs", grading.parent), ("distrl_envs.grading", grading)):
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    from distrl_envs.grading.code_examiner import examine
    from distrl_envs.grading.code_program import serve
    from distrl_envs.grading.code_session import converse

    return {"program": serve, "examiner": examine, "session": converse}


def _landlock_version() -> int:
    from distrl_envs.grading import landlock

    return landlock.version()


def _call(name: str, *arguments: Any) -> None:
    if getattr(libc, name)(*arguments) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def _isolate() -> list[str]:
    """Leaves what the system lets it leave: a list of "files", "processes", "network"."""
    user, group = os.geteuid(), os.getegid()
    try:
        if user == 0:
            _call("unshare", CLONE_NEWNS)
        else:
            _call("unshare", CLONE_NEWUSER | CLONE_NEWNS)
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
            Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    except OSError:
        return []
    isolated = []
    if _may_unshare(CLONE_NEWPID | CLONE_NEWIPC):
        isolated.append("processes")
    if _may_unshare(CLONE_NEWNET):
        isolated.append("network")
    with contextlib.suppress(OSError):
        _show_only_the_interpreter()
        isolated.append("files")
    return isolated


def _may_unshare(flags: int) -> bool:
    child = os.fork()
    if child == 0:
        os._exit(0 if libc.unshare(flags) == 0 else 1)
    return os.waitpid(child, 0)[1] == 0


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    _call("mount", source.encode(), target.encode(), kind.encode(), flags, options.encode())


def _show_only_the_interpreter() -> None:
    """Makes a file system of the system's programs and the interpreter, read only, the root."""
    _mount("none", "/", "", MS_REC | MS_PRIVATE)
    root = tempfile.mkdtemp(prefix="distrl_code_")
    above = os.open(os.path.dirname(root), os.O_PATH | os.O_DIRECTORY)
    try:
        _mount("distrl", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
        for path in _visible_paths():
            _show(path, root + path)
        for folder in ("dev/shm", "tmp", "own"):
            os.makedirs(f"{root}/{folder}")
        for name in DEVICES:
            Path(f"{root}/dev/{name}").touch()
            _mount(f"/dev/{name}", f"{root}/dev/{name}", "", MS_BIND)
        os.symlink("/proc/self/fd", f"{root}/dev/fd")
        os.mkdir(f"{root}/proc")
        _mount("/proc", f"{root}/proc", "", MS_BIND | MS_REC)
        _mount("none", root, "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
        os.chdir(root)
        _call("pivot_root", b".", b".")
        _call("umount2", b".", MNT_DETACH)
        os.chdir("/")
    except BaseException:
        libc.umount2(root.encode(), MNT_DETACH)
        raise
    finally:
        os.rmdir(os.path.basename(root), dir_fd=above)
        os.close(above)


def _visible_paths() -> list[str]:
    prefixes = {sys.prefix, sys.base_prefix}
    prefixes |= {os.path.realpath(prefix) for prefix in prefixes}
    known = sysconfig.get_paths()
    interpreter = {known[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    interpreter |= {os.path.realpath(path) for path in interpreter}
    # These scripts are read once more, by name, after the root has changed.
    interpreter.add(str(Path(__file__).parent))
    shown: list[str] = []
    parts = [os.path.join(prefix, part) for prefix in ("/", "/usr", "/usr/local", *prefixes)
             for part in PREFIX_PATHS]  # fmt: skip
    for path in ("/etc", *parts, *sorted(interpreter)):
        inside = any(path == other or path.startswith(other + "/") for other in shown)
        if os.path.exists(path) and not inside:
            shown.append(path)
    return shown


def _show(path: str, target: str) -> None:
    if os.path.islink(path):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        Path(target).touch()
    _mount(path, target, "", MS_BIND | MS_REC)
    # Flags of the mount that is bound may not be dropped by another user than root.
    kept = os.statvfs(path).f_flag & (os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC | os.ST_NOATIME)
    _mount("none", target, "", MS_REMOUNT | MS_BIND | MS_RDONLY | kept)


def _guard(
    role: Any, descriptors: list[int], settings: dict[str, Any], isolated: list[str]
) -> None:
    """Never returns: starts one sandbox, and ends all of it when the leash is let go."""
    leash, *talks = [socket.socket(fileno=descriptor) for descriptor in descriptors]
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    flags = CLONE_NEWNS if "files" in isolated else 0
    flags |= CLONE_NEWPID | CLONE_NEWIPC if "processes" in isolated else 0
    flags |= CLONE_NEWNET if "network" in isolated else 0
    folder = None
    status = 0
    try:
        if flags:
            _call("unshare", flags)
        user = FIRST_USER + os.getpid() % USERS if os.geteuid() == 0 else None
        if "files" not in isolated:
            folder = tempfile.mkdtemp(prefix="distrl_code_")
            if user is not None:
                os.chown(folder, user, user)
        child = os.fork()
        if child == 0:
            leash.close()
            _run(role, talks, settings, isolated, user, folder)
        for talk in talks:
            talk.close()
        ended = _wait(child) if leash.recv(1) else None
        status = ended or 0
        if "processes" not in isolated:
            _kill_descendants(child)
        elif ended is None:
            # The first process of a namespace takes the whole namespace with it.
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    finally:
        if folder is not None:
            _remove(folder)
        with contextlib.suppress(OSError):
            leash.send(str(status).encode())
        os._exit(0)


def _wait(child: int) -> int | None:
    """How a child ended that is about to, as `waitpid` has it; None if it stays."""
    give_up = time.monotonic() + END_PATIENCE
    while time.monotonic() < give_up:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(TICK)
    return None


def _run(
    role: Any, talks: list[socket.socket], settings: dict[str, Any], isolated: list[str],
    user: int | None, folder: str | None,
) -> None:  # fmt: skip
    """Never returns: shuts itself in, and plays its role."""
    from distrl_envs.grading import landlock
    from distrl_envs.grading.code_wire import Channel

    try:
        os.setsid()
        silence = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silence, stream)
        kept = {talk.fileno() for talk in talks}
        for descriptor in range(3, OPEN_FILES):
            if descriptor not in kept:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
        if folder is None:
            folder = _own_files(settings["disk_bytes"], processes="processes" in isolated)
        shared_user = user is None and "processes" not in isolated
        _set_limits(settings, _tasks_of_user() if shared_user else 0)
        if user is not None and "files" not in isolated:
            _keep_modules_in_reach()
        rules = None
        if "landlock" in isolated:
            devices = [f"/dev/{name}" for name in DEVICES]
            rules = landlock.ruleset(_visible_paths(), [folder], devices)
        _drop_rights(user)
        if rules is not None:
            landlock.restrict(rules)
        os.environ.update(HOME=folder, TMPDIR=folder)
        os.chdir(folder)
        examiner = len(talks) > 1
        libc.prctl(PR_SET_DUMPABLE, 0 if examiner else 1, 0, 0, 0)
        role(*map(Channel, talks))
    finally:
        os._exit(0)


def _own_files(disk_bytes: int, *, processes: bool) -> str:
    """Mounts files that vanish with the sandbox: /tmp and /dev/shm, together of limited size."""
    limits = f"mode=755,size={disk_bytes},nr_inodes={MOST_INODES}"
    _mount("distrl", "/own", "tmpfs", MS_NOSUID | MS_NODEV, limits)
    for name, target in (("tmp", "/tmp"), ("shm", "/dev/shm")):
        os.mkdir(f"/own/{name}")
        os.chmod(f"/own/{name}", 0o1777)
        _mount(f"/own/{name}", target, "", MS_BIND)
    try:
        if not processes:
            raise OSError("these processes are those of the machine")
        _mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV)
    except OSError:
        _mount("distrl", "/proc", "tmpfs", MS_NOSUID | MS_NODEV | MS_RDONLY, "size=0")
    return "/tmp"


def _set_limits(settings: dict[str, Any], tasks: int) -> None:
    processes = settings["processes"] + tasks
    cpu = int(settings["timeout"]) + 1
    for kind, soft, hard in (
        (resource.RLIMIT_CPU, cpu, cpu + 1),
        (resource.RLIMIT_AS, settings["memory_bytes"], settings["memory_bytes"]),
        (resource.RLIMIT_FSIZE, settings["file_bytes"], settings["file_bytes"]),
        (resource.RLIMIT_NPROC, processes, processes),
        (resource.RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        ceiling = resource.getrlimit(kind)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(kind, (soft, hard))


def _tasks_of_user() -> int:
    """Processes and threads that this user runs already: the limit counts them too."""
    tasks = 0
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == os.getuid():
                tasks += len(os.listdir(f"/proc/{name}/task"))
    return tasks


def _keep_modules_in_reach() -> None:
    """Lets modules be imported by a user who may not enter the folders above them.

    A folder that is open already can be entered through its descriptor.
    """
    reachable: dict[str, str] = {}
    for path in [path for path in sys.path if os.path.isdir(path)]:
        descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY)
        os.set_inheritable(descriptor, True)
        reachable[path] = f"/proc/self/fd/{descriptor}"
    sys.path[:] = [reachable.get(path, path) for path in sys.path]
    sys.path_importer_cache.clear()
    longest_first = sorted(reachable, key=len, reverse=True)
    for module in list(sys.modules.values()):
        folders = getattr(module, "__path__", None)
        if isinstance(folders, list):
            for index, folder in enumerate(folders):
                above = next((path for path in longest_first if folder.startswith(path)), None)
                if above is not None:
                    folders[index] = reachable[above] + folder[len(above) :]


def _drop_rights(user: int | None) -> None:
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    else:
        # The rights over its own namespaces; without any this changes nothing.
        header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
        libc.capset(header, (ctypes.c_uint32 * 6)())
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _kill_descendants(child: int) -> None:
    """Kills the child's session and every process that descends from this one, wherever it went.

    As their subreaper this process inherits those whose parents are gone.
    """
    give_up = time.monotonic() + KILL_PATIENCE
    while time.monotonic() < give_up:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
        for pid in _descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(TICK)


def _descendants(root: int) -> Iterator[int]:
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                parent = int(file.read().rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(name))
    found = list(children.get(root, ()))
    while found:
        pid = found.pop()
        yield pid
        found.extend(children.get(pid, ()))


def _remove(top: str) -> None:
    """Removes a folder of any depth: it goes down and up by descriptors, never by a long path."""
    here = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    path: list[str] = []
    while True:
        inner = _empty(here)
        if inner is not None:
            os.chmod(inner, 0o700, dir_fd=here)
            below = os.open(inner, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
            path.append(inner)
        elif path:
            below = os.open("..", os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
            os.rmdir(path.pop(), dir_fd=below)
        else:
            break
        os.close(here)
        here = below
    os.close(here)
    os.rmdir(top)


def _empty(folder: int) -> str | None:
    """Removes the files of a folder until one of its entries is a folder: its name."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                return entry.name
            os.unlink(entry.name, dir_fd=folder)
    return None


if __name__ == "__main__":
    main()
