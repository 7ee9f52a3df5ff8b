"""Which role an action needs: one table over the names of all operations. Pure.

An operation that the table lacks is refused to everybody, and a test says so.
"""

from __future__ import annotations

from fleet_server.errors import FleetError, ForbiddenError
from fleet_server.principals import Principal, Role

# How a person becomes a principal; how a device becomes one (its enrolment token is what counts), whom it trusts, and
# what it fetches with a ticket.
PUBLIC = frozenset(
    {
        *("login", "show_login", "create_enrolment", "show_enrolment", "show_authority", "show_revocations"),
        "fetch_artifact",
    }
)

# Devices come by the dozen from one address: what they ask is bounded where it is served, when it comes to nothing.
SELF_BOUNDED = frozenset({"create_enrolment", "show_enrolment", "fetch_artifact"})

_BY_ROLE: dict[Role, tuple[str, ...]] = {
    Role.VIEWER: (
        *("show_me", "logout", "list_fleets", "show_fleet", "list_events", "verify_events"),
        *("list_devices", "show_device", "list_profiles", "show_profile"),
        *("list_models", "show_model", "list_versions", "show_version", "list_architectures"),
        *("list_variants", "show_variant", "download_artifact", "list_gate_runs", "show_gate_run"),
        *("list_rollouts", "show_rollout", "rollout_deployments", "list_deployments"),
        *("explain_rollout", "compare_rollout", "rollout_schema", "processing_schema"),
        *("model_telemetry", "telemetry_series", "host_telemetry", "list_enrolments"),
        *("list_identities", "show_identity", "show_trust", "trust_metadata"),
        *("list_sampling_rules", "show_sampling_rule", "list_sample_requests", "show_sample_request"),
        *("list_sample_sets", "show_sample_set"),
        *("list_alerts", "count_alerts", "show_alert", "list_alert_rules", "show_alert_rule"),
        *("list_alert_silences", "show_alert_silence"),
        *("list_commands", "show_command"),
        *("show_overview", "overview_history"),
        *("list_drift", "show_drift"),
        *("list_shard_plans", "show_shard_plan"),
        *("list_agent_releases", "show_agent_release"),
    ),
    Role.OPERATOR: (
        *("change_device", "forget_device", "create_profile", "change_profile", "delete_profile"),
        *("upload", "create_version", "delete_version", "build_variants", "cancel_build"),
        *("create_gate_run", "cancel_gate_run"),
        # Samples hold what a model was asked: a viewer sees that there are some, and not what is in them.
        *("create_sample_request", "cancel_sample_request", "delete_sampling_rule"),
        *("download_sample_set", "delete_sample_set"),
        "infer_model",  # it takes devices' time
        *("acknowledge_alert", "create_alert_silence", "delete_alert_silence"),
        *("create_alert_rule", "change_alert_rule", "delete_alert_rule"),
        # A log may say what an owner would not tell everybody.
        *("command_device", "command_devices", "cancel_command", "list_command_lines", "follow_command_log"),
        *("approve_enrolment", "reject_enrolment", "register_device", "revoke_device"),
        *("create_enrolment_token", "list_enrolment_tokens", "show_enrolment_token", "delete_enrolment_token"),
    ),
    Role.RELEASER: (
        *("create_rollout", "preview_rollout", "approve_rollout", "reject_rollout", "create_bundle"),
        *("pause_rollout", "resume_rollout", "abort_rollout", "promote_rollout", "retry_rollout"),
        *("hold_device", "release_device", "pin_device"),
        *("create_shard_plan", "delete_shard_plan"),
        *("create_agent_release", "delete_agent_release"),  # what runs on every device
    ),
    Role.ADMIN: (
        *("list_users", "show_user", "create_user", "change_user", "delete_user"),
        *("list_tokens", "show_token", "create_token", "revoke_token", "create_fleet", "change_fleet"),
        "set_sampling_rule",  # whether devices keep what they are asked
        *("create_server_certificate", "make_key", "add_signatures"),
        # A receiver's address may hold a secret of its own.
        *("list_webhooks", "show_webhook", "create_webhook", "change_webhook", "delete_webhook", "test_webhook"),
        *("rotate_webhook_secret", "list_deliveries", "show_delivery", "redeliver"),
        *("list_alert_routes", "show_alert_route", "create_alert_route", "change_alert_route", "delete_alert_route"),
        "test_alert_route",
    ),
}
LEAST: dict[str, Role] = {action: role for role, actions in _BY_ROLE.items() for action in actions}
SERVER_WIDE = frozenset({"create_fleet", "create_server_certificate"})


def check(principal: Principal, action: str) -> None:
    """Let a principal do what an operation does, or not.

    Raises:
        ForbiddenError: naming the role that is needed.
        FleetError: for an operation whose role nobody declared.
    """
    least = LEAST.get(action)
    if least is None:
        raise FleetError("role_not_declared", f"nobody said who may do {action}, so nobody may: report this defect")
    if not principal.role.covers(least):
        raise ForbiddenError(
            "role_needed",
            f"this needs the role {least.value} in fleet {principal.fleet_id!r}, and {principal.name} has "
            f"{principal.role.value}: ask an admin of the fleet",
        )
    if action in SERVER_WIDE and not principal.server_wide:
        raise server_wide_needed(principal)


def server_wide_needed(principal: Principal) -> ForbiddenError:
    """What a server-wide admin may do alone, and this principal is none."""
    return ForbiddenError(
        "server_wide_needed", f"this needs a server-wide admin, and {principal.name} is of fleet {principal.fleet_id!r}"
    )
