"""The collectives of a compiled program: which kind over which axes of a mesh, in the body of which loop."""

import collections
import math
import re

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=\{?(%[\w.-]+(?:, *%[\w.-]+)*)"
)


def computations(text):
    """Of each computation of a program's text its lines."""
    found, name = {}, ""
    for line in text.splitlines():
        if opened := re.match(r"(?:ENTRY )?(%[\w.-]+) .*\{$", line):
            name = opened[1]
            found[name] = []
        elif name:
            found[name].append(line)
    return found


def of_program(program, mesh):
    """(kind, axes) -> number of arrays, of all collectives of a compiled program; loops count once."""
    found = collections.Counter()
    for line in program.as_text().splitlines():
        found.update(_collective(line, mesh, 0))
    return found


def of_loops(program, mesh, loop, smallest=0):
    """Collectives in the bodies of loops over layers, forward and backward.

    Arrays are counted, not operations: XLA combines some into one, and splits some into a start and an end. Loops
    within count once.

    Args:
      program: compiled.
      mesh: of its devices.
      loop: what the names of the loops end with.
      smallest: elements of an array that counts.

    Returns:
      (kind, axes) -> number of arrays, of the loops forward and of those backward.
    """
    lines = computations(program.as_text())
    forward, backward = collections.Counter(), collections.Counter()
    for each in (line for body in lines.values() for line in body):
        name, body = re.search(r'op_name="([^"]*)"', each), re.search(r"\bbody=(%[\w.-]+)", each)
        if body and name and " while(" in each and name[1].endswith(loop):
            (backward if "transpose(" in name[1] else forward).update(_below(body[1], lines, mesh, smallest))
    return tuple({key: count for key, count in each.items() if count} for each in (forward, backward))


def _below(name, lines, mesh, smallest):
    found = collections.Counter()
    for line in lines[name]:
        found.update(_collective(line, mesh, smallest))
        for called in _CALLED.findall(line):
            for each in re.findall(r"%[\w.-]+", called):
                found.update(_below(each, lines, mesh, smallest))
    return found


def _collective(line, mesh, smallest):
    match = re.search(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
    axes = match and _axes(line, mesh)
    if not axes:  # none, or each device alone
        return {}
    shapes = re.findall(r"\b[a-z]+\d*\[([\d,]*)\]", match[1])
    sizes = [math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes]
    if match[3] and match[2] in ("all-gather", "collective-permute"):
        sizes = sizes[len(sizes) // 2 :]  # before the results of a start stand its operands
    devices = math.prod(mesh.shape[axis] for axis in axes)
    if match[2] == "all-to-all" and len(sizes) >= devices:
        sizes = [sum(sizes[i : i + devices]) for i in range(0, len(sizes), devices)]  # a result from each device
    return {(match[2], "+".join(axes)): sum(size >= smallest for size in sizes)}


def _axes(line, mesh):
    """Those whose coordinates differ within a group."""
    order = np.array([device.id for device in mesh.devices.flat])
    coordinates = dict(zip(range(mesh.size), np.ndindex(mesh.devices.shape), strict=True))
    assert (np.sort(order) == np.arange(mesh.size)).all()
    differs = set()
    for group in _groups(line):
        places = np.array([coordinates[int(member)] for member in group])
        differs |= set(np.nonzero((places != places[0]).any(0))[0])
    return [mesh.axis_names[axis] for axis in sorted(differs)]


def _groups(line):
    """Groups of devices, numbered by their place in the mesh; XLA writes them in several ways."""
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", line):
        return [group.split(",") for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    if counted := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        sizes = [int(size) for size in counted[3].split(",")]
        devices = np.arange(math.prod(sizes)).reshape(sizes)
        if counted[4]:
            devices = devices.transpose([int(axis) for axis in counted[4].split(",")])
        return devices.reshape(int(counted[1]), int(counted[2]))
    named = re.search(r"replica_groups=mesh\[(.*?)\](.*?) \{(.*?)\}", line)
    assert named is not None, line
    sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
    devices = np.arange(math.prod(sizes.values()))
    if ordered := re.search(r"device_ids=\(?\[([\d,]+)\]\)?(?:T\(([\d,]+)\))?", named[2]):
        shape = [int(size) for size in ordered[1].split(",")]
        devices = devices.reshape(shape)
        if ordered[2]:
            devices = devices.transpose([int(axis) for axis in ordered[2].split(",")])
    grouped = [list(sizes).index(axis) for axis in re.findall(r"'(\w+)'", named[3])]
    others = [axis for axis in range(len(sizes)) if axis not in grouped]
    devices = devices.reshape(list(sizes.values())).transpose([*others, *grouped])
    return devices.reshape(-1, math.prod(list(sizes.values())[axis] for axis in grouped))
