"""The weighted mean of the silos' models; every run measures it."""

from __future__ import annotations

from gramfuse_server.merging.methods.arithmetic import weighted_mean
from gramfuse_server.merging.methods.registry import MethodModel, Silos, method


@method(
    name="simple",
    label="simple average",
    words="the mean of the silos' parameters",
    paper="McMahan et al., AISTATS 2017, with one round",
    always=True,
)
def simple(silos: Silos) -> MethodModel:
    """Return the weighted mean."""
    return MethodModel(weighted_mean(*silos.parents()))
