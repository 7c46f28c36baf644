"""Whether values are of any use: curation, composition, retrieval and cost, beside the papers' figures."""
