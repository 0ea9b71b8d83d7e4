"""Figures side by side, and what was asked of them beside what was measured."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Row = dict[str, Any]

# The peer that the figures are asked against.
RIVAL = "qemu-multifd-zstd"
# The default of `protect.max_blackout`, which the benchmark leaves as it is.
MAX_BLACKOUT_S = 0.5
COLUMNS: list[tuple[str, Callable[[Row], str]]] = [
    ("link", lambda row: str(row["link"])),
    ("load", lambda row: str(row["load"])),
    ("peer", lambda row: str(row["peer"])),
    ("first copy", lambda row: seconds(row, "copied_s")),
    ("on the wire", lambda row: megabytes(row, "wire_bytes")),
    ("move", lambda row: seconds(row, "move_s", 2)),
    ("blackout", lambda row: milliseconds(row, "blackout_s")),
    ("stopped", lambda row: milliseconds(row, "stopped_s")),
    ("busy", lambda row: "-" if row.get("load_average") is None else f"{row['load_average']:.1f}"),
    ("outcome", lambda row: outcome(row)),
]


def seconds(row: Row, key: str, digits: int = 1) -> str:
    return "-" if row.get(key) is None else f"{row[key]:.{digits}f} s"


def milliseconds(row: Row, key: str) -> str:
    return "-" if row.get(key) is None else f"{row[key] * 1e3:.0f} ms"


def megabytes(row: Row, key: str) -> str:
    return "-" if row.get(key) is None else f"{row[key] / 1e6:.1f} MB"


def outcome(row: Row) -> str:
    """How it ended; what became of the guest, where that is not as it should be."""
    fault = "started anew" if row.get("missing_beats", 0) < 0 else row.get("guest", "ok")
    return str(row["outcome"]) + ("" if fault == "ok" else f", but the guest {fault}")


class Verdict(NamedTuple):
    """One figure that is asked for, in one place."""

    where: str
    column: str
    figure: str
    asked: str
    measured: str
    kept: bool


def done(row: Row | None) -> bool:
    return row is not None and row["outcome"] == "done"


def whole(row: Row) -> bool:
    """Did the guest go on where it was, with all it had?"""
    return bool(row.get("guest", "ok") == "ok" and row.get("missing_beats", 0) == 0)


def ratio(where: str, column: str, figure: str, limit: float, ours: float,
          theirs: float) -> Verdict:
    measured = ours / theirs if theirs else float("inf")
    return Verdict(where, f"{column} ≤ {limit:g}", figure, f"at most {limit:g}",
                   f"{measured:.3f}", measured <= limit)


def beside(where: str, mine: Row, rival: Row) -> Iterator[Verdict]:
    """Farhaven beside QEMU, where both came to their end."""
    peer = "multifd-zstd with mirror"
    yield ratio(where, "copy: bytes", f"first copy: bytes over those of {peer}", 0.40,
                mine["wire_bytes"], rival["wire_bytes"])
    yield ratio(where, "copy: time", f"first copy: time over that of {peer}", 0.5,
                mine["copied_s"], rival["copied_s"])
    yield ratio(where, "move: time", f"move: time over that of {peer}", 0.1,
                mine["move_s"], rival["move_s"])
    theirs = milliseconds(rival, "blackout_s") if whole(rival) else "a guest that started anew"
    yield Verdict(where, "blackout", "blackout between heartbeats", "no longer than QEMU's",
                  f"{milliseconds(mine, 'blackout_s')} against {theirs}",
                  whole(mine) and (not whole(rival) or mine["blackout_s"] <= rival["blackout_s"]))


def steadily(where: str, mine: Row) -> Iterator[Verdict]:
    """Steady state against its floor: bytes of batches, and all on the wire."""
    floor = mine.get("steady_floor_bytes")
    if not floor:
        return
    yield ratio(where, "steady: batches", "steady: batches over the floor", 1.1,
                mine["steady_batch_bytes"], floor)
    yield ratio(where, "steady: wire", "steady: all on the wire over the floor "
                f"({floor / 1e3:.0f} kB in {mine['steady_points']} points)", 1.1,
                mine["steady_wire_bytes"], floor)


def turned(where: str, mine: Row) -> Iterator[Verdict]:
    """Protected back after it ran at the other site: all on the wire over what it
    changed there."""
    if changed := mine.get("turn_new_bytes"):
        wire, floor = mine["turn_wire_bytes"], mine["turn_floor_bytes"]
        yield ratio(where, "reprotect", "reprotect: all on the wire over what changed "
                    f"({changed / 1e6:.1f} MB, by zstd-3 {floor / 1e6:.1f}; "
                    f"sent {wire / 1e6:.1f})", 1.5, wire, changed)


def noisily(where: str, mine: Row, rival: Row | None) -> Verdict:
    """A guest that changes about as fast as the link carries, or faster: does
    a move end, and is the guest stopped no longer than the policy wants?"""
    ends = f"{seconds(mine, 'move_s')}, stopped for {milliseconds(mine, 'stopped_s')}" \
        if done(mine) else mine["outcome"]
    theirs = "not run" if rival is None else "did not end" if not done(rival) else \
        "ended" if whole(rival) else "ended, but the guest started anew"
    return Verdict(where, "noise", "noise: a move ends within the policy",
                   f"stopped for at most {MAX_BLACKOUT_S * 1e3:.0f} ms",
                   f"{ends}; QEMU: {theirs}",
                   done(mine) and mine["stopped_s"] <= MAX_BLACKOUT_S)


def judge(rows: list[Row]) -> list[Verdict]:
    """Every figure that these rows can answer for."""
    found = {(row["link"], row["load"], row["peer"]): row for row in rows}
    verdicts: list[Verdict] = []
    for (link, load, peer), mine in found.items():
        if peer != "ours":
            continue
        where, rival = f"{link}, {load}", found.get((link, load, RIVAL))
        if load.startswith("noise"):
            verdicts.append(noisily(where, mine, rival))
        if done(mine) and rival is not None and done(rival):
            verdicts += beside(where, mine, rival)
        if done(mine):
            verdicts += steadily(where, mine)
            verdicts += turned(where, mine)
            verdicts.append(Verdict(where, "the guest", "the guest goes on, whole", "ok",
                                    mine.get("guest", "ok"), whole(mine)))
        else:
            verdicts.append(Verdict(where, "the guest", "protected and moved", "done",
                                    mine["outcome"], False))
    return verdicts


def text_table(heads: list[str], lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    return "\n".join("  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)
                               ).rstrip() for line in [heads, *lines])


def markdown_table(heads: list[str], lines: list[list[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def pivot(verdicts: list[Verdict]) -> str:
    """A line for each place, a column for each figure, what was missed in bold."""
    columns = list(dict.fromkeys(verdict.column for verdict in verdicts))
    columns.sort(key=lambda column: column in ("noise", "the guest"))
    lines = []
    for where in dict.fromkeys(verdict.where for verdict in verdicts):
        mine = {v.column: v for v in verdicts if v.where == where}
        cells = [mine.get(column) for column in columns]
        lines.append([where, *("" if v is None else v.measured if v.kept else f"**{v.measured}**"
                               for v in cells)])
    return markdown_table(["where", *columns], lines)


def report(rows: list[Row], markdown: bool = False) -> str:
    """The table of all cells, and the judgement; for a page, a table for each link."""
    heads = [head for head, _ in COLUMNS]
    lines = [[form(row) for _, form in COLUMNS] for row in rows]
    verdicts = judge(rows)
    if markdown:
        tables = [pivot(verdicts)] if verdicts else []
        for link in dict.fromkeys(line[0] for line in lines):
            mine = [line[1:] for line in lines if line[0] == link]
            tables.append(f"### {link}\n\n" + markdown_table(heads[1:], mine))
        return "\n\n".join(tables)
    judged = [[v.where, v.figure, v.asked, v.measured, "yes" if v.kept else "NO"]
              for v in verdicts]
    told = text_table(heads, lines)
    if judged:
        told += "\n\n" + text_table(["where", "figure", "asked", "measured", "kept"], judged)
    return told
