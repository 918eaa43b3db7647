"""How weights travel from the policy to the generators."""
