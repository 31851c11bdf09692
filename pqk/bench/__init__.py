"""How long a file takes on a CPU: contenders measured in turn, statistics, the latency oracle."""
