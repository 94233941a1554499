"""Runs over several machines: keys, the federation's folder, the processes of coordinator and sites."""
