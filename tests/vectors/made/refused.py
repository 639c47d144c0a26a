"""All that must be refused."""

from __future__ import annotations

from collections.abc import Sequence

from tests.vectors.made.refused_parts import refused_messages, refused_parts
from tests.vectors.made.refused_steps import (
    Refused,
    refused_adverts,
    refused_cohorts,
    refused_contributions,
    refused_releases,
    refused_shares,
    refused_survivors,
    refused_unmasking,
)
from tests.vectors.made.sources import Json


def refused(good: Sequence[Json]) -> list[Json]:
    bad = Refused(good)
    refused_cohorts(bad)
    refused_adverts(bad)
    refused_shares(bad)
    refused_contributions(bad)
    refused_survivors(bad)
    refused_releases(bad)
    refused_unmasking(bad)
    refused_parts(bad)
    refused_messages(bad)
    return bad.found
