# What a site changes: the only file here to edit (or copy it, and say export ESVIT_ENV=/path/to/your-env.sh).
# Read by every job on its first node, before anything starts; what is exported reaches all ranks.
# shellcheck shell=bash disable=SC2034

# --- software: one of these -------------------------------------------------------------------------------------------
# 1. Modules and a virtual environment on the shared file system.
# module load python/3.11 cuda/12.6
# ESVIT_PYTHON=$HOME/esvit-scale/.venv/bin/python
# 2. A container (docs/slurm.md says how to build one). Bind every folder that holds data or runs.
# ESVIT_CONTAINER=(apptainer exec --nv --bind /scratch esvit-scale.sif)
# ESVIT_PYTHON=python3

# --- network ----------------------------------------------------------------------------------------------------------
# export NCCL_SOCKET_IFNAME=ib0     # which interface ranks find each other by
# export GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5           # which InfiniBand adapters carry the data
# export NCCL_DEBUG=WARN

# --- scratch ----------------------------------------------------------------------------------------------------------
# A folder on each node's own disk, for compiled kernels; by default the site's TMPDIR, else /tmp.
# export ESVIT_LOCAL=/local/scratch/$USER

# --- behaviour --------------------------------------------------------------------------------------------------------
ESVIT_PREFLIGHT=${ESVIT_PREFLIGHT:-1}         # check the nodes before jobs of several nodes; 0: do not
ESVIT_MAX_FAILURES=${ESVIT_MAX_FAILURES:-3}   # failures in a row, with no new checkpoint between, before a job gives up
