"""The section of one run's page about what it cost."""

from __future__ import annotations

from fedgraft import words
from fedgraft.report.blocks import Block, Facts, Figure, Grid, Note, Section
from fedgraft.report.figures import Series, curves
from fedgraft.report.record import Record
from fedgraft.report.shaping import RESUME, absent, number, span_of
from fedgraft.report.table import cost

PEAKS = (("peak_memory", "peak memory"), ("peak_gpu_memory", "peak GPU memory"))
ENERGY = (("energy_processors", "energy of the processors"), ("energy_gpus", "energy of the GPUs"))


def traffic_and_time(record: Record) -> Section:
    """Bytes, seconds and tokens."""
    title = "Cost"
    if not record.rounds:
        return absent("cost", title, f"No round is finished yet. In the folder of this run, continue with: {RESUME}")
    return Section(name="cost", title=title, blocks=[_totals(record), *_account(record), *_sessions(record), *_curves(record)])


def _totals(record: Record) -> Facts:
    total = cost(record)
    seconds = total["training_seconds"]
    return Facts(
        items=[
            ("bytes up, all clients", f"{total['bytes_up'] / 1e6:,.2f} MB"),
            ("bytes down, all clients", f"{total['bytes_down'] / 1e6:,.2f} MB"),
            ("training tokens", f"{total['training_tokens']:,}"),
            ("training time", f"{seconds:,.1f} s"),
            ("tokens per second", f"{total['training_tokens'] / seconds:,.0f}" if seconds else "–"),
        ]
    )


def _curves(record: Record) -> list[Block]:
    text = "Bytes are those of the encoded packages and replies (fp32), as they would cross a wire. Seconds are wall clock and vary."
    return [_bytes(record), _seconds(record), _speed(record), Note(text=text)]


def _account(record: Record) -> list[Block]:
    """What is trained and sent, and what a token costs with and without it."""
    known = record.spending.get("account")
    if not known:
        return [Note(text="How many parameters are trained and what a token costs was not recorded with this run (cost.json).")]
    base, grafted = known["flops_base"], known["flops_grafted"]
    parts = [
        ("base model", base),
        ("LoRA", known["flops_adapters"]),
        ("grafted experts and gates", known["flops_graft"]),
        ("in all", grafted),
    ]
    rows = [[name, words.flops(count), f"{100 * count / base:.1f} %"] for name, count in parts]
    facts = Facts(
        items=[
            ("parameters of the base, frozen", words.count(known["parameters"])),
            ("trained by a client", words.count(known["trained"])),
            ("of these travelling", words.count(known["shared"])),
            ("of these private", words.count(known["personal"])),
        ]
    )
    caption = "FLOPs per token of one forward, counted from shapes"
    return [facts, Grid(caption=caption, columns=["part", "FLOPs", "of the base"], rows=rows, sortable=False)]


def _sessions(record: Record) -> list[Block]:
    """Seconds by phase and peaks of memory, of each time that the run was taken up."""
    sessions = record.spending.get("sessions", [])
    if not sessions:
        return []
    phases = list(dict.fromkeys(phase for session in sessions for phase in session["seconds"]))
    peaks = [(key, label) for key, label in PEAKS if any(key in session for session in sessions)]
    rows = [
        [phase, *(f"{session['seconds'][phase]:,.1f}" if phase in session["seconds"] else "–" for session in sessions)] for phase in phases
    ]
    feet = [
        ["all phases", *(f"{sum(session['seconds'].values()):,.1f}" for session in sessions)],
        *([label, *(words.size(session[key]) if key in session else "–" for session in sessions)] for key, label in peaks),
    ]
    several = [f"session {at}, to round {session['rounds']}" for at, session in enumerate(sessions, start=1)]
    columns = ["phase", *(several if len(sessions) > 1 else ["seconds"])]
    feet += [
        [label, *(f"{session[key] / 3600:,.2f} Wh" if key in session else "–" for session in sessions)]
        for key, label in ENERGY
        if any(key in session for session in sessions)
    ]
    caption = "Seconds by phase, and peak memory of this process" + ("" if len(sessions) == 1 else ", each time the run was taken up")
    return [Grid(caption=caption, columns=columns, rows=rows, feet=feet, sortable=False)]


def _bytes(record: Record) -> Figure:
    lines = [(line["round"] + 1, line["bytes_up"] / 1e6, line["bytes_down"] / 1e6) for line in record.rounds]
    return curves(
        "bytes",
        "Bytes per round",
        f"In the last round {lines[-1][1]:.2f} MB went up and {lines[-1][2]:.2f} MB down, all clients together.",
        [
            Series(label="down", style="s0", points=[(at, down) for at, _, down in lines]),
            Series(label="up", style="s5", points=[(at, up) for at, up, _ in lines]),
        ],
        Grid(
            caption="MB per round", columns=["round", "up", "down"], rows=[[str(at), f"{up:.3f}", f"{down:.3f}"] for at, up, down in lines]
        ),
        x_title="round",
        y_title="MB, all clients",
        x=span_of(record),
        zero=True,
    )


def _seconds(record: Record) -> Figure:
    points = [(line["round"] + 1, number(line.get("seconds"))) for line in record.rounds]
    return curves(
        "seconds",
        "Seconds per round",
        f"The last round took {points[-1][1]:.1f} seconds.",
        [Series(label="seconds", style="s0", points=points)],
        Grid(caption="Seconds per round", columns=["round", "seconds"], rows=[[str(at), f"{value:.2f}"] for at, value in points]),
        x_title="round",
        y_title="seconds",
        x=span_of(record),
        zero=True,
    )


def _speed(record: Record) -> Figure:
    speeds = [
        (line["round"] + 1, line["tokens"], line["tokens"] / line["seconds"] if line["seconds"] else float("nan")) for line in record.rounds
    ]
    return curves(
        "speed",
        "Tokens per second",
        f"In the last round {speeds[-1][1]:,} tokens.",
        [Series(label="tokens per second", style="s0", points=[(at, speed) for at, _, speed in speeds])],
        Grid(
            caption="Tokens per round and per second",
            columns=["round", "tokens", "tokens per second"],
            rows=[[str(at), f"{tokens:,}", f"{speed:,.0f}"] for at, tokens, speed in speeds],
        ),
        x_title="round",
        y_title="tokens per second",
        x=span_of(record),
        zero=True,
    )
