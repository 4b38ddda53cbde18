#!/bin/bash
# Gradescope runs this once, when it builds the autograder's machine.
set -e
apt-get update && apt-get install -y python3-pip
pip install --break-system-packages -r /autograder/source/requirements.txt
