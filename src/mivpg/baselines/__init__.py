"""The caption baselines of PatchGastricADC22 (arXiv 2202.03432): a frozen CNN and a recurrent decoder."""
