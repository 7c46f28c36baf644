"""assay where people already train: Hugging Face Trainer, TRL and Lightning.

Each trainer has a module of its own, imported only by who uses it: `assay.integrations.transformers`,
`assay.integrations.lightning`. Accelerate and a plain loop need none: `assay.Run` takes their optimizer as it is.
"""
