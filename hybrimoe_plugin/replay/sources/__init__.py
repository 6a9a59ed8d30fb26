"""Where traces come from besides recorded runs: public routing data, and generators."""

from hybrimoe_plugin.replay.sources.conversations import interleaved, lengths, stretches
from hybrimoe_plugin.replay.sources.load import load_trace
from hybrimoe_plugin.replay.sources.popularity import Popularity, counts, read_popularity
from hybrimoe_plugin.replay.sources.predictions import with_predictions
from hybrimoe_plugin.replay.sources.route_csv import read_route_csv
from hybrimoe_plugin.replay.sources.synthetic import synthetic
from hybrimoe_plugin.replay.sources.trees import trees

__all__ = [
    "Popularity",
    "counts",
    "interleaved",
    "lengths",
    "load_trace",
    "read_popularity",
    "read_route_csv",
    "stretches",
    "synthetic",
    "trees",
    "with_predictions",
]
