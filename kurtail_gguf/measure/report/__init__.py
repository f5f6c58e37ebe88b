"""The page of ``convert --report``: one HTML file that needs nothing else."""
