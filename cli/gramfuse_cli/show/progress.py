"""Shows a run's progress on standard error: bars on a terminal, plain lines otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from gramfuse_deployment.terminal import bars, say
from gramfuse_server.report.page.words import PHASE_TITLES


class RunProgress:
    """Shows the phases of a run, and each silo's training steps.

    Args:
        silos: names, in roster order.
        poll: returns a silo's latest progress (phase, done, total), or None; called only during training.
    """

    def __init__(self, silos: tuple[str, ...], poll: Callable[[str], Mapping[str, Any] | None]) -> None:
        self.silos = silos
        self.poll = poll
        self.phase = ""
        self._progress = bars("  {task.description:<12}", "{task.fields[doing]:<8}")
        self._bars: dict[str, Any] = {}

    def __enter__(self) -> RunProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._progress.stop()

    def take(self, event: Mapping[str, Any]) -> None:
        """Show one event of the run."""
        phase = event["phase"]
        match event["state"]:
            case "start":
                self.phase = phase
                self._say(f"{self._title(event)}{self._place(event)}", "bold")
                if phase == "train":
                    self._bars = {s: self._progress.add_task(s, total=None, doing="") for s in self.silos}
            case "silo":
                self._silo(event)
            case "wait":
                self._say(f"  {event['connected']} of {event['needed']} silos are connected")
            case "waiting":
                doing = "away" if event["away"] else "no answer yet"
                self._say(f"  {event['silo']:<12} {doing}, {event['seconds'] // 60} min", "dim")
            case "lost":
                self._say(f"  {event['silo']:<12} lost: {event['reason']}", "yellow")
            case "try":
                self._say(f"  {event['name']:<12} …", "dim")
            case "measured":
                self._say(f"  {event['name']:<12} measured")
            case "end":
                self._say(f"  {event['seconds']:.1f} s", "dim")

    def refresh(self) -> None:
        """Update the bars with each silo's progress."""
        if self.phase != "train" or not self._progress.console.is_terminal:
            return
        for silo, bar in self._bars.items():
            note = self.poll(silo)
            if note is not None:
                doing = {"train": "training", "measure": "measuring"}.get(note["phase"], note["phase"])
                self._progress.update(bar, completed=note["done"], total=note["total"], doing=doing)

    @staticmethod
    def _title(event: Mapping[str, Any]) -> str:
        work, phase = event.get("work"), event["phase"]
        if phase == "train" and work in ("fit", "refit"):
            return "silos measure features, for the head"
        if phase == "evaluate" and work == "fit":  # nobody measures a head before training
            return "silos receive the head"
        return PHASE_TITLES[phase]

    @staticmethod
    def _place(event: Mapping[str, Any]) -> str:
        """Return where in a run of several sessions an event is, in brackets."""
        match event.get("work"):
            case "fit":
                return " (fit of the head)"
            case "refit":
                return " (second fit of the head)"
            case _:
                return f" (round {event['round']} of {event['rounds']})" if "round" in event else ""

    def _silo(self, event: Mapping[str, Any]) -> None:
        silo = event["silo"]
        match event["phase"]:
            case "train":
                if silo in self._bars:
                    self._progress.remove_task(self._bars.pop(silo))
                self._say(f"  {silo:<12} ready" + (f", {event['examples']} examples" if event["examples"] else ""))
            case "upload" | "masked":
                if event["piece"] == event["pieces"]:
                    self._say(f"  {silo:<12} complete")
            case _:
                self._say(f"  {silo:<12} ok")

    def _say(self, line: str, style: str = "") -> None:
        say(line, style=style, on=self._progress.console)
