"""Floor 6: the command line. A module per command, imported when the command is asked for."""
