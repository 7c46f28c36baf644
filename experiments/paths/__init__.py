"""Values along a step: what the tables of `docs/results.md` rest on."""
