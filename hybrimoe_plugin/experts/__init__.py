"""Where expert weights live and how they are computed. Knows nothing of models and rules."""
