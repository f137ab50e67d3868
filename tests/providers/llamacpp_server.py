"""Run llama.cpp's HTTP server from the package xllamacpp, which has it as a library."""

import sys
import threading

import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.model_alias = {"tiny"}
params.port = int(sys.argv[2])
params.n_ctx = 0
params.n_parallel = 1
# Threads that wait for each other are slow on a busy machine.
params.cpuparams.n_threads = 1
params.cpuparams_batch.n_threads = 1
params.sampling.temp = 0
params.warmup = False
server = xllamacpp.Server(params)
threading.Event().wait()
