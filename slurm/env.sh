# The settings of a site: the only file here to edit (or edit a copy and run: export ESVIT_ENV=/path/to/your-env.sh).
# Every job reads it on its first node before anything starts; exported variables reach all ranks.
# shellcheck shell=bash disable=SC2034

# --- software: one of these -------------------------------------------------------------------------------------------
# 1. Modules and a virtual environment on the shared file system.
# module load python/3.11 cuda/12.6
# ESVIT_PYTHON=$HOME/esvit-scale/.venv/bin/python
# 2. A container (docs/slurm.md says how to build one). Bind every folder that holds data or runs.
# ESVIT_CONTAINER=(apptainer exec --nv --bind /scratch esvit-scale.sif)
# ESVIT_PYTHON=python3

# --- network ----------------------------------------------------------------------------------------------------------
# export NCCL_SOCKET_IFNAME=ib0     # network interface over which ranks find each other
# export GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5           # InfiniBand adapters that carry the data
# export NCCL_DEBUG=WARN

# --- scratch ----------------------------------------------------------------------------------------------------------
# Folder on each node's own disk for compiled kernels (default: TMPDIR, or /tmp).
# export ESVIT_LOCAL=/local/scratch/$USER

# --- behaviour --------------------------------------------------------------------------------------------------------
ESVIT_PREFLIGHT=${ESVIT_PREFLIGHT:-1}         # 1: check the nodes before a job of several nodes; 0: do not
ESVIT_MAX_FAILURES=${ESVIT_MAX_FAILURES:-3}   # failures in a row without a new checkpoint after which a job gives up
