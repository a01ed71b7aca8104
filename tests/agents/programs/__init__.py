"""Programs for environments that have one client each and nothing of qwenrt. Each runs the functions named as its
arguments, after the server's address."""
