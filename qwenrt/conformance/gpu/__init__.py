"""Minutes on a borrowed accelerator: what only it can show, the most important first, in one command."""
