"""One module per question; each prints our figure, the other's figure and the ratio, measured in one run."""
