"""Whether values are of any use: curation, composition, retrieval and cost, beside the papers' figures."""

EXPERIMENTS = ("mislabels", "fidelity", "effects", "curation", "composition", "ladder", "cost")
"""What belongs to it, each a module here and a command."""
