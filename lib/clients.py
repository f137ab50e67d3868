"""The addresses of HTTP clients."""

from ipaddress import IPv4Address, ip_address, ip_network

from django.conf import settings
from django.http import HttpRequest

UNKNOWN_NETWORK = "unknown"


def client_ip(request: HttpRequest) -> str | None:
    """Return the address that a request comes from; None on a Unix socket.

    Behind `TRUSTED_PROXIES` proxies, each of which appends the address of its own client, as many of
    the last entries of X-Forwarded-For are trusted.
    """
    address = forwarded_address(
        request.META.get("REMOTE_ADDR", ""), request.META.get("HTTP_X_FORWARDED_FOR", "")
    )
    try:
        return str(ip_address(address))
    except ValueError:
        return None


def forwarded_address(address: str, forwarded_for: str) -> str:
    """Return the address of the client behind the connection's address and its X-Forwarded-For."""
    if not settings.TRUSTED_PROXIES:
        return address
    entries = forwarded_for.split(",")
    return entries[-min(settings.TRUSTED_PROXIES, len(entries))].strip() or address


def network(address: str | None) -> str:
    """Return the network that is counted as one client: an IPv4 address, or the /64 of an IPv6 one,
    all of which a client may use."""
    if address is None:
        return UNKNOWN_NETWORK
    ip = ip_address(address)
    if isinstance(ip, IPv4Address):
        return str(ip)
    if ip.ipv4_mapped:
        return str(ip.ipv4_mapped)
    return str(ip_network((ip, 64), strict=False))
