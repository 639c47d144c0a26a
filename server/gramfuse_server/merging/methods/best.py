"""The best of the silos' own models, chosen with hindsight."""

from __future__ import annotations

from gramfuse_server.merging.methods.registry import MethodSums, Silos, method


@method(
    name="best",
    label="best",
    words="the best of the silos' own models, chosen with hindsight",
    needs=("models",),
)
def best(silos: Silos) -> MethodSums:
    """Measure all silos' own models, and return the one that is best on the reported data themselves."""
    ranked = silos.ranked_by
    measured = {name: silos.measure(silos.deltas(name)) for name in silos.names}
    scores = {name: silos.metrics(sums)[ranked] for name, sums in measured.items()}
    name = max(scores, key=scores.__getitem__)
    note = f"chosen by {ranked} on the data of this report: an upper bound for choosing one silo's model"
    return MethodSums(measured[name], (name,), {"silo": name, "note": note})
