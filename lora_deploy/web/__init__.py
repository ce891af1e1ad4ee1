"""A static page that runs an export in the browser: its base is loaded once, its adapters go in and out."""

from lora_deploy.web.page import Page, write_page
from lora_deploy.web.server import make_server

__all__ = ["Page", "make_server", "write_page"]
