# SPDX-License-Identifier: Apache-2.0
"""The main job: two small models, and what every package makes of them."""
