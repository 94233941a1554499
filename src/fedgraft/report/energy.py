"""Energy that processors and GPUs used, as far as the machine tells: Linux' powercap counters, and NVML where nvidia-ml-py is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")


class Energy:
    """Joules since it was made, of the whole machine: what else ran there is in them."""

    def __init__(self) -> None:
        """Find the counters that may be read; often only root may."""
        self._counters = {name: (read, wraps) for name, read, wraps in (*_processors(), *_cards())}
        self._seen = {name: read() for name, (read, _) in self._counters.items()}
        self._joules = dict.fromkeys(self._counters, 0.0)

    def look(self) -> None:
        """Read the counters. A processor's begins anew after some hundred kilojoules, so look now and then, every few minutes at least."""
        for name, (read, wraps) in self._counters.items():
            now = read()
            self._joules[name] += (now - self._seen[name]) % wraps if wraps else now - self._seen[name]
            self._seen[name] = now

    def facts(self) -> dict[str, float]:
        """`energy_processors` and `energy_gpus` in joules; what the machine does not tell is absent."""
        self.look()
        kinds = sorted({name.partition(" ")[0] for name in self._joules})
        return {kind: round(sum(joules for name, joules in self._joules.items() if name.startswith(kind)), 1) for kind in kinds}


def _processors() -> Iterator[tuple[str, Callable[[], float], float]]:
    """(name, joules so far, where the counter begins anew) of every package; its parts are counted in it."""
    for folder in sorted(POWERCAP.glob("intel-rapl:*")):  # AMD's processors are there too
        if folder.name.count(":") == 1:
            file = folder / "energy_uj"
            try:
                _of_file(file)
                wraps = float((folder / "max_energy_range_uj").read_text(encoding="ascii"))
            except (OSError, ValueError):
                continue
            yield f"energy_processors {folder.name}", partial(_of_file, file), wraps / 1e6


def _cards() -> Iterator[tuple[str, Callable[[], float], float]]:
    """As `_processors`, of every GPU that keeps such a counter."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
    except Exception:  # not installed, no driver, or one that does not answer: then nobody tells
        return
    for number, handle in enumerate(handles):
        try:
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except pynvml.NVMLError:
            continue
        yield f"energy_gpus {number}", partial(_of_card, pynvml, handle), 0.0


def _of_file(file: Path) -> float:
    return float(file.read_text(encoding="ascii")) / 1e6


def _of_card(nvml: Any, card: Any) -> float:
    return float(nvml.nvmlDeviceGetTotalEnergyConsumption(card)) / 1e3
