"""A picture of the figures: bytes and time of a first copy, by peer."""

from typing import Any

from judge import Row

COLOURS = {"ours": "#1b6ca8", "qemu-plain": "#c9c9c9", "qemu-xbzrle": "#a9a9a9",
           "qemu-multifd-zstd": "#e08e45", "qemu-multifd-zstd-throttled": "#b5651d",
           "rsync": "#8fb996", "nbdcopy": "#5f8a68"}
PANELS = (("wire_bytes", 1e6, "MB on the wire"), ("copied_s", 1, "seconds"))


def draw(rows: list[Row], path: str) -> None:
    """Writes the chart; needs python3-matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("a chart needs matplotlib: apt-get install -y python3-matplotlib, then "
                         "/usr/bin/python3 benches/wan/run --show FILE --chart FILE") from error
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "font.size": 8,
                                "svg.hashsalt": "farhaven"})
    from matplotlib import pyplot

    links = list(dict.fromkeys(row["link"] for row in rows))
    figure, panels = pyplot.subplots(len(links), len(PANELS), squeeze=False,
                                     figsize=(9, 2.6 * len(links) + 0.6))
    for link, line in zip(links, panels, strict=True):
        for axes, (key, scale, label) in zip(line, PANELS, strict=True):
            bars(axes, [row for row in rows if row["link"] == link], key, scale)
            axes.set_title(f"{link}: {label}", loc="left")
    marks = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for peer, colour in COLOURS.items()
             if any(row["peer"] == peer for row in rows)]
    names = [peer for peer in COLOURS if any(row["peer"] == peer for row in rows)]
    figure.suptitle("First copy of memory and disk; for QEMU, with the move that it is part of "
                    "(× did not end)", x=0.01, ha="left", fontsize=8)
    figure.legend(marks, names, loc="lower center", ncol=4, frameon=False)
    figure.tight_layout(rect=(0, 0.55 / figure.get_figheight(), 1, 1))
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)


def bars(axes: Any, rows: list[Row], key: str, scale: float) -> None:
    """A group of bars for each load; a cross where a peer did not come to its end."""
    loads = list(dict.fromkeys(row["load"] for row in rows))
    width = 0.8 / max(1, max(sum(row["load"] == load for row in rows) for load in loads))
    for at, load in enumerate(loads):
        group = [row for row in rows if row["load"] == load]
        for turn, row in enumerate(group):
            place = at + (turn - (len(group) - 1) / 2) * width
            if row.get(key) is None:
                axes.text(place, 0, "×", ha="center", va="bottom", color="#b00020")
            else:
                axes.bar(place, row[key] / scale, width * 0.9,
                         color=COLOURS.get(row["peer"], "#666666"))
    axes.set_xticks(range(len(loads)), loads)
    axes.spines[["top", "right"]].set_visible(False)
