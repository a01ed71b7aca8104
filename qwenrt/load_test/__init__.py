"""Load for a server that speaks OpenAI's dialect, and what came of it. Needs no torch.

workloads.py says what is asked and pacing.py when; connections.py speaks HTTP and client.py OpenAI's dialect over it;
running.py is the clients' loop, figures.py what is reported, server_process.py a server of our own to measure.
"""
