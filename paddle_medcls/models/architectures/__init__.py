"""Network architectures, one module a family; `network.MODELS` names the networks."""
