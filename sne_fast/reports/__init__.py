"""Reports of experiments: measures, plots, CSV files, and a description of the machine they ran on."""
