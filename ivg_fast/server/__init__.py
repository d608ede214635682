# SPDX-License-Identifier: Apache-2.0
"""An HTTP server in OpenAI's form over an AsyncEngine; needs the extra `server`.

`ivg_fast.server.app.create_app` makes the ASGI application, `ivg_fast.server.serve.serve` runs it.
"""
