import django.db.models.deletion
import django.utils.timezone
from django.conf import settings
from django.db import migrations, models


class Migration(migrations.Migration):
    """Deliveries are made anew: none is kept that has its body in its own row."""

    dependencies = [
        ('agents', '0007_outcomes_to_deliver'),
        ('hooks', '0002_encrypted_secrets'),
        ('realm', '0002_switch_permission'),
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
    ]

    operations = [
        migrations.DeleteModel(name='Delivery'),
        migrations.CreateModel(
            name='Outcome',
            fields=[
                ('id', models.UUIDField(editable=False, primary_key=True, serialize=False)),
                ('body', models.TextField()),
                ('size', models.PositiveIntegerField(help_text='In bytes.')),
                ('created_at', models.DateTimeField(default=django.utils.timezone.now, editable=False)),
                ('run', models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, related_name='outcomes', to='agents.run')),
            ],
            options={
                'indexes': [models.Index(fields=['created_at'], name='outcome_oldest')],
            },
        ),
        migrations.CreateModel(
            name='Delivery',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('type', models.CharField(help_text='Such as run.completed.', max_length=20)),
                ('status', models.CharField(choices=[('ready', 'Ready'), ('sending', 'Sending'), ('failed', 'Failed'), ('sent', 'Sent'), ('dead', 'Dead')], default='ready', max_length=7)),
                ('attempts', models.PositiveIntegerField(default=0)),
                ('attempt_base', models.PositiveIntegerField(default=0)),
                ('next_try_at', models.DateTimeField(blank=True, default=django.utils.timezone.now, help_text='While it is being sent, when that is taken for lost. Empty once it has ended.', null=True)),
                ('status_code', models.PositiveSmallIntegerField(blank=True, help_text='Of the last answer.', null=True)),
                ('error', models.TextField(blank=True)),
                ('created_at', models.DateTimeField(default=django.utils.timezone.now, editable=False)),
                ('tried_at', models.DateTimeField(blank=True, null=True)),
                ('sent_at', models.DateTimeField(blank=True, null=True)),
                ('event', models.ForeignKey(db_column='event_id', db_index=False, on_delete=django.db.models.deletion.CASCADE, related_name='deliveries', to='hooks.outcome')),
                ('run', models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, related_name='deliveries', to='agents.run')),
                ('subscription', models.ForeignKey(db_index=False, on_delete=django.db.models.deletion.CASCADE, related_name='deliveries', to='hooks.subscription')),
            ],
            options={
                'verbose_name_plural': 'deliveries',
                'permissions': [('resend_delivery', 'Can have deliveries sent again')],
                'indexes': [
                    models.Index(condition=models.Q(('next_try_at__isnull', False)), fields=['subscription', 'next_try_at'], name='delivery_unfinished'),
                    models.Index(fields=['-created_at', 'id'], name='delivery_newest'),
                    models.Index(fields=['status', '-created_at'], name='delivery_by_status'),
                    models.Index(fields=['subscription', '-created_at'], name='delivery_by_subscription'),
                ],
                'constraints': [
                    models.UniqueConstraint(fields=('event', 'subscription'), name='delivery_is_made_once'),
                    models.CheckConstraint(condition=models.Q(models.Q(('next_try_at__isnull', True), ('status__in', ['sent', 'dead'])), models.Q(models.Q(('status__in', ['sent', 'dead']), _negated=True), ('next_try_at__isnull', False)), _connector='OR'), name='delivery_is_due_until_it_ends'),
                ],
            },
        ),
        migrations.AddConstraint(
            model_name='subscription',
            constraint=models.UniqueConstraint(condition=models.Q(('registration', None)), fields=('owner', 'url'), name='subscription_is_unique'),
        ),
        migrations.AddConstraint(
            model_name='subscription',
            constraint=models.UniqueConstraint(condition=models.Q(('registration__isnull', False)), fields=('owner', 'url', 'registration'), name='subscription_is_unique_to_a_bot'),
        ),
    ]
