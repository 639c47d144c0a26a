"""The best of the silos' own models, picked with hindsight."""

from __future__ import annotations

from gramfuse_server.merging.methods.registry import CandidateSums, Silos, method


@method(
    name="best",
    label="best",
    words="the best of the silos' own models, picked with hindsight",
    needs=("models",),
)
def best(silos: Silos) -> CandidateSums:
    """Measure all silos' own models, and return the one that does best on the very data that are reported."""
    ranked = silos.ranked_by
    found = {name: silos.measure(silos.deltas(name)) for name in silos.names}
    scores = {name: silos.metrics(sums)[ranked] for name, sums in found.items()}
    name = max(scores, key=scores.__getitem__)
    note = f"chosen by {ranked} on the data of this report: no way of picking one silo's model does better"
    return CandidateSums(found[name], (name,), {"silo": name, "note": note})
